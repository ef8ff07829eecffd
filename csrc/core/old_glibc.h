// glibc gives a function that it changes or moves a new version, and whatever is linked on a newer system asks for that
// version: so a library built here would not load on an older one. These take the oldest version, under a name of the
// library's own, for code that cannot be told (the C++ library's headers, CUDA's static runtime). Both versions do
// the same, but that an old pthread_kill fails for a thread that has ended; a call costs one jump more.
#pragma once

#include <cstdlib>  // says which C library this is

#if defined(__linux__) && defined(__x86_64__) && defined(__GLIBC__)
#define FUSEDOPTIM_OLD_GLIBC 1

// Of a function `name`, the one that glibc had in its release `version`.
#define FUSEDOPTIM_FROM_GLIBC(version, name)                                                                 \
  asm(".symver fusedoptim_old_" #name ", " #name "@GLIBC_" #version "\n.pushsection .text\n.globl " #name    \
      "\n.hidden " #name "\n.type " #name ", @function\n" #name ":\n\tendbr64\n\tjmp *fusedoptim_old_" #name \
      "@GOTPCREL(%rip)\n.size " #name ", .-" #name "\n.popsection")
#endif

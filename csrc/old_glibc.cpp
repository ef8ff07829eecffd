// What _C would need of a glibc beyond 2.14: see core/old_glibc.h.
#include "core/old_glibc.h"

#ifdef FUSEDOPTIM_OLD_GLIBC
FUSEDOPTIM_FROM_GLIBC(2.2.5, pow);
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlsym);

// Tells shared_ptr whether it may count without atomic instructions. glibc has it from 2.32 on; here the answer is no.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

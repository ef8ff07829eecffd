// What CUDA's static runtime would need of a glibc beyond 2.17: threads, libraries and shared memory, which moved into
// libc with 2.34. See core/old_glibc.h. A runtime that needs more of it: python -m release.wheels names what.
#include <cstdlib>

#include "../core/old_glibc.h"

#ifdef FUSEDOPTIM_OLD_GLIBC
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlopen);
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlclose);
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlerror);
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlsym);
FUSEDOPTIM_FROM_GLIBC(2.2.5, dlvsym);
FUSEDOPTIM_FROM_GLIBC(2.3.4, dlmopen);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_condattr_setpshared);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_create);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_detach);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_getspecific);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_join);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_key_create);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_key_delete);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_kill);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_mutex_trylock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_mutexattr_destroy);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_mutexattr_init);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_mutexattr_setpshared);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_mutexattr_settype);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_once);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_destroy);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_init);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_rdlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_timedrdlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_timedwrlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_tryrdlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_trywrlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_unlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlock_wrlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlockattr_destroy);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlockattr_init);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_rwlockattr_setpshared);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_setspecific);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_spin_destroy);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_spin_init);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_spin_lock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_spin_trylock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, pthread_spin_unlock);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_destroy);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_init);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_post);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_timedwait);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_trywait);
FUSEDOPTIM_FROM_GLIBC(2.2.5, sem_wait);
FUSEDOPTIM_FROM_GLIBC(2.2.5, shm_open);
FUSEDOPTIM_FROM_GLIBC(2.2.5, shm_unlink);
#endif

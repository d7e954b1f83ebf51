/* Live and peak bytes of a process's large allocations, loaded with LD_PRELOAD before anything else.
 *
 * Only blocks of at least LARGE bytes count: those are tensors, whatever the allocator underneath keeps in reserve.
 * Small blocks (Python objects, bookkeeping) pass through with one comparison, so timed runs can carry the counter.
 * Memory that a program maps itself (mmap) is not seen here; it shows in the resident figures.
 *
 * Build: cc -O2 -shared -fPIC -o malloc_counter.so malloc_counter.c     (glibc: it names the functions underneath)
 */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

#define LARGE ((size_t)16384)

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long live, peak;

static void *born(void *block) {
    size_t size = malloc_usable_size(block);
    if (size < LARGE) return block;
    long now = atomic_fetch_add(&live, (long)size) + (long)size;
    long seen = atomic_load(&peak);
    while (now > seen && !atomic_compare_exchange_weak(&peak, &seen, now)) {
    }
    return block;
}

static void died(size_t size) {
    if (size >= LARGE) atomic_fetch_sub(&live, (long)size);
}

void *malloc(size_t size) { return born(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return born(__libc_calloc(count, size)); }

void *realloc(void *old, size_t size) {
    size_t old_size = malloc_usable_size(old);
    void *block = __libc_realloc(old, size);
    if (block || size == 0) died(old_size); /* a failed realloc leaves the old block alive */
    return born(block);
}

void free(void *block) {
    died(malloc_usable_size(block));
    __libc_free(block);
}

void *memalign(size_t alignment, size_t size) { return born(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void *valloc(size_t size) { return memalign((size_t)sysconf(_SC_PAGESIZE), size); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *made = memalign(alignment, size);
    if (!made) return ENOMEM;
    *block = made;
    return 0;
}

/* What memory.py reads, through the process's own symbols. */
long malloc_counter_live(void) { return atomic_load(&live); }

long malloc_counter_peak(void) { return atomic_load(&peak); }

void malloc_counter_restart_peak(void) { atomic_store(&peak, atomic_load(&live)); }

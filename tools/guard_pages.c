// Preloaded, gives tensors memory that ends, or starts, at a page nobody may touch, and that is never given out twice.
// torch allocates with posix_memalign. Written for tools/fuzz_operators.py, which compiles it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const size_t PAGE = 4096, MOST = (size_t)1 << 30;
static const uintptr_t FIRST = 0x100000000000, LAST = 0x180000000000; // addresses that Linux leaves free
static uintptr_t next = 0x100000000000;
static int guarding, at_start;

void guard_pages(int low) {
  guarding = 1;
  at_start = low;
}

int posix_memalign(void **out, size_t alignment, size_t size) {
  static int (*original)(void **, size_t, size_t);
  if (!original) original = dlsym(RTLD_NEXT, "posix_memalign");
  if (!guarding) return original(out, alignment, size);
  if (size > MOST) return ENOMEM;
  size_t length = (size + !size + PAGE - 1) / PAGE * PAGE;
  uintptr_t start = __sync_fetch_and_add(&next, length + 2 * PAGE) + PAGE; // what lies around it is not mapped
  if (start + length + PAGE > LAST) return ENOMEM;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
  uint8_t *data = mmap((void *)start, length, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (data == MAP_FAILED) return ENOMEM;
  memset(data, 0x7b, length); // as an index or a size it is far out
  *out = at_start ? data : data + length - size - !size;
  return 0;
}

void free(void *pointer) {
  static void (*original)(void *);
  uintptr_t start = (uintptr_t)pointer & ~(PAGE - 1), end = start;
  if (start < FIRST || start >= LAST) {
    if (!original) original = dlsym(RTLD_NEXT, "free");
    original(pointer);
    return;
  }
  unsigned char resident;
  while (mincore((void *)end, PAGE, &resident) == 0) end += PAGE; // to the page that is not mapped
  munmap((void *)start, end - start);
}

/* What every ahead-of-time kernel is, and how one is launched. `aot_launch.c` says how it is done. */
#ifndef FASTCACHE_AOT_LAUNCH_H
#define FASTCACHE_AOT_LAUNCH_H

#include <stdint.h>

#define FASTCACHE_EXPORT __attribute__((visibility("default")))
#define FASTCACHE_MAX_DEVICES 64

/* Codes beside the CUDA driver's own, which are positive. */
#define FASTCACHE_NO_DRIVER (-1)
#define FASTCACHE_NO_IMAGE (-2)
#define FASTCACHE_NO_DEVICE (-3)

/* One kernel for one architecture; PTX for all that are newer, too. */
typedef struct {
    int architecture; /* 89 for sm_89 */
    int is_ptx;
    int exact; /* runs on this architecture only, as sm_90a does */
    unsigned shared_bytes;
    const unsigned char *data;
} fastcache_image;

typedef struct {
    const char *entry;
    unsigned threads;
    int num_images;
    const fastcache_image *images;
    /* Per device, once it was launched there. */
    void *functions[FASTCACHE_MAX_DEVICES];
    unsigned shared_bytes[FASTCACHE_MAX_DEVICES];
} fastcache_kernel;

/* With a grid_x of 0 the kernel is only loaded: what comes later may be captured in a graph, where loading fails. */
int fastcache_launch(fastcache_kernel *kernel, int device, void *stream, unsigned grid_x, unsigned grid_y,
                     unsigned grid_z, void **arguments);

/* What a launch function's result means, in a string that need not be freed. */
FASTCACHE_EXPORT const char *fastcache_error(int code);

#endif

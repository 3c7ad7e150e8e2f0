/* Launches embedded kernels through the CUDA driver, which is opened at the first launch: no CUDA is needed to link.
 *
 * A launch is in the device's primary context, the one that PyTorch and the CUDA runtime work in. Of a kernel's images
 * the one for the device's own architecture is loaded, else the nearest older one of the same generation that is not
 * for one architecture only, else PTX, which the driver compiles.
 */
#include "aot_launch.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>

/* From the CUDA driver API's cuda.h. */
typedef int CUresult;
typedef int CUdevice;
typedef void *CUcontext;
typedef void *CUmodule;
typedef void *CUfunction;
typedef void *CUstream;
enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };

static struct {
    CUresult (*init)(unsigned);
    CUresult (*device_get)(CUdevice *, int);
    CUresult (*device_attribute)(int *, int, CUdevice);
    CUresult (*retain_context)(CUcontext *, CUdevice);
    CUresult (*get_context)(CUcontext *);
    CUresult (*push_context)(CUcontext);
    CUresult (*pop_context)(CUcontext *);
    CUresult (*load_module)(CUmodule *, const void *);
    CUresult (*get_function)(CUfunction *, CUmodule, const char *);
    CUresult (*set_attribute)(CUfunction, int, int);
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                       void **, void **);
    CUresult (*error_string)(CUresult, const char **);
} driver;

static CUcontext contexts[FASTCACHE_MAX_DEVICES];
static int capabilities[FASTCACHE_MAX_DEVICES];
static int driver_state; /* 0 before the first launch, 1 when open, else a code below 0 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return FASTCACHE_NO_DRIVER;
    const struct {
        const char *name;
        void *place;
    } functions[] = {
        {"cuInit", &driver.init},
        {"cuDeviceGet", &driver.device_get},
        {"cuDeviceGetAttribute", &driver.device_attribute},
        {"cuDevicePrimaryCtxRetain", &driver.retain_context},
        {"cuCtxGetCurrent", &driver.get_context},
        {"cuCtxPushCurrent_v2", &driver.push_context},
        {"cuCtxPopCurrent_v2", &driver.pop_context},
        {"cuModuleLoadData", &driver.load_module},
        {"cuModuleGetFunction", &driver.get_function},
        {"cuFuncSetAttribute", &driver.set_attribute},
        {"cuLaunchKernel", &driver.launch},
        {"cuGetErrorString", &driver.error_string},
    };
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *function = dlsym(library, functions[i].name);
        if (function == NULL) return FASTCACHE_NO_DRIVER;
        memcpy(functions[i].place, &function, sizeof function);
    }
    return driver.init(0) == 0 ? 1 : FASTCACHE_NO_DRIVER;
}

/* The device's primary context, retained once and for good. Call with the lock held. */
static int open_device(int device) {
    if (driver_state == 0) driver_state = open_driver();
    if (driver_state < 0) return driver_state;
    if (contexts[device] != NULL) return 0;
    CUdevice handle;
    int major, minor;
    CUcontext context;
    int code = driver.device_get(&handle, device);
    if (code == 0) code = driver.device_attribute(&major, COMPUTE_CAPABILITY_MAJOR, handle);
    if (code == 0) code = driver.device_attribute(&minor, COMPUTE_CAPABILITY_MINOR, handle);
    if (code == 0) code = driver.retain_context(&context, handle);
    if (code != 0) return code;
    capabilities[device] = 10 * major + minor;
    contexts[device] = context;
    return 0;
}

static const fastcache_image *choose_image(const fastcache_kernel *kernel, int capability, int is_ptx) {
    const fastcache_image *best = NULL;
    for (int i = 0; i < kernel->num_images; i++) {
        const fastcache_image *image = &kernel->images[i];
        if (image->is_ptx != is_ptx || image->architecture > capability) continue;
        if (image->architecture == capability) return image;
        if (!is_ptx && (image->exact || image->architecture / 10 != capability / 10)) continue;
        if (best == NULL || image->architecture > best->architecture) best = image;
    }
    return best;
}

/* Load the kernel in the current context, the device's. Call with the lock held. */
static int load(fastcache_kernel *kernel, int device) {
    if (kernel->functions[device] != NULL) return 0;
    int code = FASTCACHE_NO_IMAGE;
    /* A driver of CUDA 12 refuses the cubins of CUDA 13's assembler, and compiles the PTX, which is older. */
    for (int is_ptx = 0; is_ptx <= 1; is_ptx++) {
        const fastcache_image *image = choose_image(kernel, capabilities[device], is_ptx);
        if (image == NULL) continue;
        CUmodule module;
        CUfunction function;
        code = driver.load_module(&module, image->data);
        if (code != 0) continue;
        code = driver.get_function(&function, module, kernel->entry);
        /* 48 KiB is what a kernel has without asking. */
        if (code == 0 && image->shared_bytes > 49152)
            code = driver.set_attribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)image->shared_bytes);
        if (code != 0) return code;
        kernel->shared_bytes[device] = image->shared_bytes;
        __atomic_store_n(&kernel->functions[device], function, __ATOMIC_RELEASE);
        return 0;
    }
    return code;
}

int fastcache_launch(fastcache_kernel *kernel, int device, void *stream, unsigned grid_x, unsigned grid_y,
                     unsigned grid_z, void **arguments) {
    if (device < 0 || device >= FASTCACHE_MAX_DEVICES) return FASTCACHE_NO_DEVICE;
    CUfunction function = __atomic_load_n(&kernel->functions[device], __ATOMIC_ACQUIRE);
    int code = 0;
    if (function == NULL) {
        pthread_mutex_lock(&lock);
        code = open_device(device);
        pthread_mutex_unlock(&lock);
        if (code != 0) return code;
    }
    CUcontext current, popped;
    code = driver.get_context(&current);
    if (code != 0) return code;
    int foreign = current != contexts[device];
    if (foreign && (code = driver.push_context(contexts[device])) != 0) return code;
    if (function == NULL) {
        pthread_mutex_lock(&lock);
        code = load(kernel, device);
        pthread_mutex_unlock(&lock);
        function = kernel->functions[device];
    }
    if (code == 0 && grid_x > 0)
        code = driver.launch(function, grid_x, grid_y, grid_z, kernel->threads, 1, 1, kernel->shared_bytes[device],
                             stream, arguments, NULL);
    if (foreign) driver.pop_context(&popped);
    return code;
}

const char *fastcache_error(int code) {
    const char *text = NULL;
    switch (code) {
    case 0: return "no error";
    case FASTCACHE_NO_DRIVER: return "expected an NVIDIA driver (libcuda.so.1), found none that works; install one";
    case FASTCACHE_NO_IMAGE: return "expected a GPU of compute capability 8.0 or newer, got an older one";
    case FASTCACHE_NO_DEVICE: return "expected a device number below 64";
    }
    if (driver_state == 1 && driver.error_string(code, &text) == 0 && text != NULL) return text;
    return "unknown error of the CUDA driver";
}

/* Stands in for libcuda.so.1 where there is no GPU: says on standard output what the launcher asks of it.
 *
 * STAND_IN_CAPABILITY is the device's, as 90; with STAND_IN_OLD set it refuses cubins, as a driver does that is older
 * than they are. Arguments are told as those of guidance_statistics: four addresses, two numbers, two addresses.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long context = 7, current;

static int capability(void) { return atoi(getenv("STAND_IN_CAPABILITY")); }

int cuInit(unsigned flags) { return setvbuf(stdout, NULL, _IOLBF, 0), (int)flags; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? capability() / 10 : capability() % 10;
    return device;
}
int cuDevicePrimaryCtxRetain(void **result, int device) { return *result = &context, puts("retain"), device; }
int cuCtxGetCurrent(void **result) { return *result = current ? &context : NULL, 0; }
int cuCtxPushCurrent_v2(void *pushed) { return current = pushed == &context, puts("push"), 0; }
int cuCtxPopCurrent_v2(void **popped) { return *popped = &context, current = 0, puts("pop"), 0; }
int cuModuleLoadData(void **module, const void *image) {
    const unsigned char *bytes = image;
    if (memcmp(bytes, "\177ELF", 4) != 0) {
        const char *target = strstr(image, ".target sm_");
        printf("load ptx %.2s\n", target + strlen(".target sm_"));
    } else {
        if (getenv("STAND_IN_OLD")) return puts("refuse"), 222;
        unsigned flags;
        memcpy(&flags, bytes + 48, sizeof flags);
        /* the architecture's place in the header, before and since ABI version 8 */
        printf("load cubin %u\n", bytes[8] < 8 ? flags & 0xFF : flags >> 8 & 0xFF);
    }
    return *module = &context, 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    return *function = module, printf("function %s\n", name), 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return function == NULL || attribute != 8 || value < 0; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    printf("launch grid %u %u %u threads %u %u %u stream %ld", gx, gy, gz, bx, by, bz, (long)stream);
    for (int i = 0; i < 4; i++) printf(" %ld", *(long *)arguments[i]);
    printf(" %d %d %ld %ld\n", *(int *)arguments[4], *(int *)arguments[5], *(long *)arguments[6], *(long *)arguments[7]);
    return function != &context || !current || extra != NULL || shared > 49152;
}
int cuGetErrorString(int code, const char **text) { return *text = code == 101 ? "invalid device ordinal" : NULL, 0; }

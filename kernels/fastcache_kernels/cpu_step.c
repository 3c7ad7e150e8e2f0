/* What a step does beside its engine, on a CPU: two calls, one thread, nothing allocated.
 *
 * `reference.py` says what is computed: `duplicate` before the engine, `guide` and `combine` after it. Between two steps
 * the latents may be written to, so a step's input is made when the step begins and not when the one before it ends.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
/* Without these the vectors are as long as the oldest CPU's; musl and macOS choose nothing while they load a library. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* Values that stay in the first-level cache while a step works on them: 4 KiB, and as much of each row it reads. */
enum { BLOCK = 1024 };

/* `cpu_step.py` has the same fields. Sizes are in values; an image is `size` of them, and a row of the history is
 * `images` images. `noise_pred` has `halves` such rows; `model_input` has an image every `input_stride` values. */
typedef struct {
    const float *latents;
    float *model_input;
    float *timesteps;
    const float *noise_pred;
    float *guided;
    float *following;
    const float *const *rows;
    const float *weights;
    float *contrast; /* NULL where no row counts it */
    int64_t num_rows, images, size, input_stride, halves;
    float input_scale, timestep, guidance_scale, image_guidance_scale, rescale;
} fastcache_step;

typedef struct {
    double count, mean, squares;
} spread;

/* Count values in: their sum of squared deviations, joined with what came before after Chan, Golub and LeVeque (1979),
 * equation 2.1. In float32 only a block's own sums are made. */
INLINE void count_in(spread *all, const float *values, int64_t n) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += values[i];
    const float mean = sum / (float)n;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) squares += (values[i] - mean) * (values[i] - mean);
    const double count = all->count + (double)n, off = mean - all->mean;
    all->squares += squares + off * off * all->count * (double)n / count;
    all->mean += off * (double)n / count;
    all->count = count;
}

INLINE void guide(const fastcache_step *step, int64_t at, int64_t n) {
    const int64_t row = step->images * step->size;
    const float *first = step->noise_pred + at, *second = first + row, *third = second + row;
    const float scale = step->guidance_scale, of_image = step->image_guidance_scale;
    float *out = step->guided + at;
    if (step->halves == 1) {
        memcpy(out, first, (size_t)n * sizeof(float));
    } else if (step->halves == 2) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = first[i] + scale * (second[i] - first[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            out[i] = first[i] + of_image * (second[i] - first[i]) + scale * (third[i] - second[i]);
    }
    if (step->contrast) {
        const float *conditional = first + (step->halves - 1) * row, *other = conditional - row;
        float *contrast = step->contrast + at;
        if (step->halves == 1) {
            memset(contrast, 0, (size_t)n * sizeof(float));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) contrast[i] = conditional[i] - other[i];
        }
    }
}

/* The size that a rescaled prediction is multiplied by; leaves the prediction as it is before that. */
INLINE float guide_and_compare(const fastcache_step *step, int64_t at) {
    const float *conditional = step->noise_pred + step->images * step->size;
    spread of_conditional = {0}, of_guided = {0};
    for (int64_t end = at + step->size; at < end; at += BLOCK) {
        const int64_t n = end - at < BLOCK ? end - at : BLOCK;
        guide(step, at, n);
        count_in(&of_conditional, conditional + at, n);
        count_in(&of_guided, step->guided + at, n);
    }
    const float factor = (float)sqrt(of_conditional.squares / of_guided.squares);
    return 1 + step->rescale * (factor - 1);
}

INLINE void combine(const fastcache_step *step, int64_t at, int64_t n) {
    float sum[BLOCK];
    memset(sum, 0, (size_t)n * sizeof(float));
    for (int64_t r = 0; r < step->num_rows; r++) {
        const float weight = step->weights[r], *row = step->rows[r] + at;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sum[i] += weight * row[i];
    }
    memcpy(step->following + at, sum, (size_t)n * sizeof(float));
}

EXPORT CLONES void fastcache_step_begin(const fastcache_step *step) {
    const float scale = step->input_scale;
    for (int64_t row = 0; row < step->halves * step->images; row++) {
        const float *latents = step->latents + row % step->images * step->size;
        float *out = step->model_input + row * step->input_stride;
#pragma omp simd
        for (int64_t i = 0; i < step->size; i++) out[i] = scale * latents[i];
        step->timesteps[row] = step->timestep;
    }
}

EXPORT CLONES void fastcache_step_end(const fastcache_step *step) {
    const int rescaled = step->rescale > 0 && step->halves == 2;
    for (int64_t image = 0; image < step->images; image++) {
        const int64_t first = image * step->size;
        const float factor = rescaled ? guide_and_compare(step, first) : 1;
        for (int64_t at = first, end = first + step->size; at < end; at += BLOCK) {
            const int64_t n = end - at < BLOCK ? end - at : BLOCK;
            float *guided = step->guided + at;
            if (rescaled) {
#pragma omp simd
                for (int64_t i = 0; i < n; i++) guided[i] *= factor;
            } else {
                guide(step, at, n);
            }
            combine(step, at, n);
        }
    }
}

/* The hash of this file, as it was when the library was built. */
EXPORT const char *fastcache_cpu_source_sha256(void) { return SOURCE_SHA256; }

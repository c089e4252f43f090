/* Two inner loops of batched generation on a CPU, where the stock operators leave most of the time:
 * one-query grouped attention over ragged key/value slots, and picking a token from a row of logits.
 * Plain C that the compiler vectorises; built on first use by kernels.py, which has a torch fallback. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bf16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

#define HD 64
#define GROUP_MAX 8

/* q: [batch, kv_heads * group, HD] float32, already scaled by 1/sqrt(HD).
 * k, v: [batch, kv_heads, capacity, HD] bfloat16; slot b holds lens[b] positions.
 * scratch: [group, capacity] float32. out: like q. */
void dsdlab_attend(const float *q, const uint16_t *k, const uint16_t *v, const int32_t *lens, float *out,
                   float *scratch, int64_t batch, int64_t kv_heads, int64_t group, int64_t capacity) {
    for (int64_t b = 0; b < batch; b++) {
        const int64_t n = lens[b];
        for (int64_t h = 0; h < kv_heads; h++) {
            const uint16_t *kb = k + (b * kv_heads + h) * capacity * HD;
            const uint16_t *vb = v + (b * kv_heads + h) * capacity * HD;
            const float *qb = q + (b * kv_heads + h) * group * HD;
            float *ob = out + (b * kv_heads + h) * group * HD;
            for (int64_t j = 0; j < n; j++) {
                float row[HD];
                for (int d = 0; d < HD; d++) row[d] = bf16(kb[j * HD + d]);
                for (int64_t g = 0; g < group; g++) {
                    float s = 0.f;
                    for (int d = 0; d < HD; d++) s += row[d] * qb[g * HD + d];
                    scratch[g * capacity + j] = s;
                }
            }
            float acc[GROUP_MAX][HD];
            float total[GROUP_MAX];
            for (int64_t g = 0; g < group; g++) {
                float *s = scratch + g * capacity, top = -INFINITY, sum = 0.f;
                for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
                for (int64_t j = 0; j < n; j++) {
                    s[j] = expf(s[j] - top);
                    sum += s[j];
                }
                total[g] = sum;
                for (int d = 0; d < HD; d++) acc[g][d] = 0.f;
            }
            for (int64_t j = 0; j < n; j++) {
                float row[HD];
                for (int d = 0; d < HD; d++) row[d] = bf16(vb[j * HD + d]);
                for (int64_t g = 0; g < group; g++) {
                    const float p = scratch[g * capacity + j];
                    for (int d = 0; d < HD; d++) acc[g][d] += p * row[d];
                }
            }
            for (int64_t g = 0; g < group; g++)
                for (int d = 0; d < HD; d++) ob[g * HD + d] = acc[g][d] / total[g];
        }
    }
}

/* logits: [rows, vocab] bfloat16. inv_t: [rows], 0 for greedy. u: [rows] uniform in [0, 1).
 * token: [rows] the choice; lse: [rows] log-sum-exp of the row at temperature 1. scratch: [vocab] float32. */
void dsdlab_pick(const uint16_t *logits, const float *inv_t, const float *u, int64_t *token, float *lse,
                 float *scratch, int64_t rows, int64_t vocab) {
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *row = logits + r * vocab;
        float top = -INFINITY, sum = 0.f;
        for (int64_t i = 0; i < vocab; i++) {
            const float x = bf16(row[i]);
            scratch[i] = x;
            top = x > top ? x : top;
        }
        for (int64_t i = 0; i < vocab; i++) sum += expf(scratch[i] - top);
        lse[r] = top + logf(sum);
        if (inv_t[r] == 0.f) {
            int64_t i = 0;
            while (scratch[i] < top) i++;
            token[r] = i;
            continue;
        }
        float warm = 0.f;
        const float scale = inv_t[r];
        for (int64_t i = 0; i < vocab; i++) {
            scratch[i] = expf((scratch[i] - top) * scale);
            warm += scratch[i];
        }
        /* inverse of the distribution function, in blocks so that the scan is short */
        double left = (double)u[r] * warm;
        int64_t i = 0;
        for (; i + 64 < vocab; i += 64) {
            float block = 0.f;
            for (int d = 0; d < 64; d++) block += scratch[i + d];
            if (left < block) break;
            left -= block;
        }
        for (; i + 1 < vocab && left >= scratch[i]; i++) left -= scratch[i];
        token[r] = i;
    }
}

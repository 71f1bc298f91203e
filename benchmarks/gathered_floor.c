// Attention of one query per head to listed tokens, by hand, for benchmarks/decoding.py: what XLA's product could cost.
// q [heads, D], k and v [T, heads, D], lists [heads, most], y [heads, D]; at most 65536 tokens of a list.
#include <math.h>
#include <string.h>

enum { D = 64, AHEAD = 8 };

static const float *row(const float *cache, int token, int heads, int head) {
  return cache + ((long)token * heads + head) * D;
}

static void ask(const float *numbers) {
  for (int i = 0; i < D; i += 16) __builtin_prefetch(numbers + i, 0, 3);
}

void gathered(const float *q, const float *k, const float *v, const int *lists, float *y, int heads, int most,
              float scale) {
  static float weight[65536];
  for (int head = 0; head < heads; head++) {
    const int *list = lists + head * most;
    float largest = -INFINITY, total = 0, sum[D];
    for (int i = 0; i < most; i++) {
      if (i + AHEAD < most) ask(row(k, list[i + AHEAD], heads, head));
      const float *key = row(k, list[i], heads, head);
      float score = 0;
      for (int j = 0; j < D; j++) score += key[j] * q[head * D + j];
      weight[i] = score * scale;
      if (weight[i] > largest) largest = weight[i];
    }
    memset(sum, 0, sizeof sum);
    for (int i = 0; i < most; i++) {
      if (i + AHEAD < most) ask(row(v, list[i + AHEAD], heads, head));
      const float *value = row(v, list[i], heads, head);
      const float share = expf(weight[i] - largest);
      total += share;
      for (int j = 0; j < D; j++) sum[j] += share * value[j];
    }
    for (int j = 0; j < D; j++) y[head * D + j] = sum[j] / total;
  }
}

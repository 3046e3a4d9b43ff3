/* The whole C ABI of the kernels. Plain structs and pointers: no torch, no Python.
 *
 * dtype names the element type of the activations. Statistics, weights and masses are held in the
 * accumulator type: double for SRA_F64, float for everything else.
 * Every entry point returns SRA_OK or the reason why it refused; it writes nothing when it refuses. */
#ifndef SRA_KERNELS_H
#define SRA_KERNELS_H

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define SRA_KERNELS_ABI 2

enum sra_dtype { SRA_F32 = 0, SRA_BF16 = 1, SRA_F16 = 2, SRA_F64 = 3 };

enum sra_status {
  SRA_OK = 0,
  SRA_BAD_SPANS = 1,   /* out of range, reversed, or a column that decreases */
  SRA_BAD_WEIGHTS = 2, /* NaN, infinite or negative */
  SRA_BAD_DTYPE = 3,
};

/* span_com: com[s] = sum over rows t of span s of weights[t] * hidden[t] / mass[s]. */
typedef struct {
  const void* hidden;      /* [tokens, dim], rows hidden_stride elements apart */
  const int64_t* spans;    /* [count, 2] half-open row ranges, both columns non-decreasing */
  const void* weights;     /* [tokens], or NULL: every weight is 1 */
  void* com;               /* [count, dim]      out of forward; into backward for grad_weights,
                              then in the accumulator type */
  void* mass;              /* [count]           out of forward, into backward */
  const void* grad_com;    /* [count, dim]      backward only, as all that follows */
  const void* grad_mass;   /* [count] */
  void* grad_hidden;       /* [tokens, dim], or NULL: not wanted */
  void* grad_weights;      /* [tokens], or NULL: not wanted */
  int64_t tokens, count, dim, hidden_stride;
  int32_t dtype;
  int32_t wide_com;        /* forward writes com in the accumulator type, not rounded */
  int32_t threads;
} sra_span_com;

int sra_kernels_abi(void);
int sra_span_com_forward(const sra_span_com* p);
int sra_span_com_backward(const sra_span_com* p);

#if defined(__cplusplus)
}
#endif
#endif

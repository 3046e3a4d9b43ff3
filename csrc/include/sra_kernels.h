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

#define SRA_KERNELS_ABI 5

#define SRA_SPAN_KL_STATS 16 /* sums over a row that spare the backward a sweep; 0: not known */

enum sra_dtype { SRA_F32 = 0, SRA_BF16 = 1, SRA_F16 = 2, SRA_F64 = 3 };

enum sra_direction { SRA_FORWARD = 0, SRA_REVERSE = 1, SRA_JSD = 2 };
enum sra_outside { SRA_RENORMALISE = 0, SRA_WEIGHT = 1, SRA_BUCKET = 2 };

enum sra_status {
  SRA_OK = 0,
  SRA_BAD_SPANS = 1,   /* out of range, reversed, or a column that decreases */
  SRA_BAD_WEIGHTS = 2, /* NaN, infinite or negative */
  SRA_BAD_DTYPE = 3,
  SRA_BAD_IDS = 4,     /* out of range, or one entry named twice */
  SRA_BAD_INDEX = 5,   /* a query row out of range */
  SRA_LAUNCH_FAILED = 6, /* sra_cuda_error() says why */
};

/* span_com: com[s] = sum over rows t of span s of weights[t] * hidden[t] / mass[s]. */
typedef struct {
  const void* hidden;      /* [tokens, dim], rows hidden_stride elements apart */
  const int64_t* spans;    /* [count, 2] half-open row ranges, both columns non-decreasing */
  const void* weights;     /* [tokens], or NULL: every weight is 1 */
  void* com;               /* [count, dim]      out of forward */
  void* mass;              /* [count]           out of forward, into backward */
  const void* grad_com;    /* [count, dim]      backward only, as all that follows */
  const void* grad_mass;   /* [count] */
  void* grad_hidden;       /* [tokens, dim], or NULL: not wanted */
  void* grad_weights;      /* [tokens], or NULL: not wanted */
  int64_t tokens, count, dim, hidden_stride;
  int32_t dtype;
  int32_t threads;
} sra_span_com;

/* span_kl: the divergence of each row's two softmaxes, and its gradient. What is NULL is not made.
 * With z = softcap(scale * logit), softcap(z) = cap * tanh(z / cap), on either side. */
typedef struct {
  const void* student;        /* [rows, student_entries], rows student_stride elements apart */
  const void* teacher;        /* [rows, teacher_entries] */
  const int64_t* student_ids; /* [shared], or NULL: every entry of that side is shared */
  const int64_t* teacher_ids; /* [shared], or NULL */
  const void* factors;        /* [rows] on kl and grad, or NULL: 1. A row of factor 0 gives zeros */
  void* kl;                   /* [rows] */
  void* mass;                 /* [rows] the teacher's softmax inside teacher_ids */
  void* stats;                /* [rows, SRA_SPAN_KL_STATS] out, for `known` of a later call */
  const void* known;          /* in: those of an earlier call on the same logits */
  void* grad;                 /* [rows, student_entries] with respect to `student`; may be `student`
                                 itself, but with student_ids only if outside is SRA_BUCKET */
  int64_t rows, student_entries, teacher_entries, shared;
  int64_t student_stride, teacher_stride, grad_stride;
  double temperature, beta;
  double student_scale, student_softcap, teacher_scale, teacher_softcap; /* 1 and 0 for none */
  int32_t student_dtype, teacher_dtype, grad_dtype;
  int32_t direction, outside;
  int32_t threads;
} sra_span_kl;

/* linear_span_kl: head[ids[k]] = factor * rows[k], and zeros in every other row. */
typedef struct {
  const void* rows;   /* [count, dim] */
  const int64_t* ids; /* [count], unique */
  void* head;         /* [entries, dim] */
  int64_t count, entries, dim;
  double factor;
  int32_t rows_dtype, head_dtype;
  int32_t threads;
} sra_head_rows;

/* attention_mass: mass[b, j] = sum over heads and query rows of the softmax weight of key j, over the
 * sample's sum. Query row i stands at key position i + keys - queries and sees no later key. */
typedef struct {
  const void* query;          /* [batch, heads, queries, dim], any strides but the last, which is 1 */
  const void* key;            /* [batch, kv_heads, keys, dim], likewise */
  const int64_t* query_index; /* [batch], the one row that counts in each sample; or NULL: all */
  const uint8_t* key_mask;    /* [batch, keys], 0 at masked keys, or NULL */
  const void* lse;            /* [batch, heads, queries], natural log-sum-exp of the visible scores in
                                 the accumulator type, or NULL: computed. Not with query_index */
  void* mass;                 /* [batch, keys] */
  int64_t query_strides[3];   /* batch, head, row, in elements */
  int64_t key_strides[3];
  int64_t batch, heads, kv_heads, queries, keys, dim;
  int64_t window;             /* keys that a row sees, its own the last; 0: no window */
  double scale, softcap;      /* softcap 0: none */
  int32_t dtype;
  int32_t threads;
} sra_attention_mass;

/* span_geometry: loss[b] = mean over the pairs i != j of sample b, weighted by weights[i] * weights[j],
 * of (cos(student_i, student_j) - cos(teacher_i, teacher_j))^2. Spans of weight 0 are not read. */
typedef struct {
  const void* student;     /* [spans, student_dim], rows student_stride elements apart */
  const void* teacher;     /* [spans, teacher_dim], rows teacher_stride elements apart */
  const void* weights;     /* [spans], in the accumulator type of student, as loss */
  const int64_t* offsets;  /* [samples + 1]: sample b owns spans offsets[b]:offsets[b + 1] */
  void* loss;              /* [samples] */
  void* grad;              /* [spans, student_dim] of the sum of loss, float for SRA_F16 and otherwise
                              in student's type; or NULL: not wanted */
  int64_t spans, samples, student_dim, teacher_dim, student_stride, teacher_stride;
  int32_t student_dtype, teacher_dtype;
  int32_t threads;
} sra_span_geometry;

int sra_kernels_abi(void);
int sra_span_com_forward(const sra_span_com* p);
int sra_span_com_backward(const sra_span_com* p);
int sra_span_kl_forward(const sra_span_kl* p); /* value, gradient, or both */
int sra_linear_span_kl_restore(const sra_head_rows* p);
int sra_attention_mass_forward(const sra_attention_mass* p);
int sra_span_geometry_forward(const sra_span_geometry* p);
void sra_prefer_huge_pages(void* begin, int64_t bytes); /* advice, before a large buffer is touched */

/* The CUDA library. Pointers are of the current device, `stream` is a cudaStream_t. Nothing is
 * allocated and nothing waits: the caller gives a workspace of at least the bytes asked for, aligned
 * to 64. Contents are not checked: of bad spans or weights come NaNs. `threads` is not read. */
int sra_cuda_abi(void);
int sra_cuda_emulated(void);      /* 1 in the CPU emulation of the tests */
int sra_cuda_runs(void);          /* SRA_OK if the current GPU and its driver can run the kernels */
const char* sra_cuda_error(void); /* of this thread's last launch that failed, or sra_cuda_runs */
int64_t sra_cuda_span_com_workspace(const sra_span_com* p);
int sra_cuda_span_com_forward(const sra_span_com* p, void* workspace, void* stream);
int sra_cuda_span_com_backward(const sra_span_com* p, void* workspace, void* stream);
/* span_kl: the ids are known by two tables, and not read: partner [student_entries] is the teacher's
 * entry of each of the student's, -1 for none, or NULL: the one of the same number; shared_teacher
 * [teacher_entries] is 1 where the teacher's entry is some partner, or NULL: all are. */
int64_t sra_cuda_span_kl_workspace(const sra_span_kl* p);
int sra_cuda_span_kl_forward(const sra_span_kl* p, const int32_t* partner,
                             const uint8_t* shared_teacher, void* workspace, void* stream);
int64_t sra_cuda_linear_span_kl_workspace(const sra_head_rows* p);
int sra_cuda_linear_span_kl_restore(const sra_head_rows* p, const void* factor, void* workspace,
                                    void* stream); /* factor: a scalar on the device, or NULL: 1 */
int64_t sra_cuda_attention_mass_workspace(const sra_attention_mass* p); /* query_index is needed */
int sra_cuda_attention_mass_forward(const sra_attention_mass* p, void* workspace, void* stream);
int64_t sra_cuda_span_geometry_workspace(const sra_span_geometry* p);
int sra_cuda_span_geometry_forward(const sra_span_geometry* p, void* workspace, void* stream);

#if defined(__cplusplus)
}
#endif
#endif

/* run.c - a language model in one C file.
 *
 * A language model is two files: this program and its parameters. Given a text so far as tokens
 * (its pieces, as numbers), the model gives each token of its vocabulary a score (a logit) for
 * being next. Scores become probabilities; we draw a token, append it, and ask again. That is all.
 *
 *     [1] The model            [1.1] parameters  [1.2] mathematics  [1.3] a batch on its way
 *                              [1.4] attention and the cache  [1.5] forward  [1.6] the sampler
 *                              [1.7] generate
 *     [2] Numbers and files    [2.1] numbers  [2.2] matrices  [2.3] rounding to int8
 *                              [2.4] errors and memory  [2.5] cache pages  [2.6] checkpoints
 *                              [2.7] experts
 *     [3] The tokenizer        [3.1] looking things up  [3.2] opening  [3.3] encoding, decoding
 *     [4] Speed                [4.1] threads  [4.2] large pages  [4.3] SIMD  [4.4] kernels
 *                              [4.5] products  [4.6] attention: same bits as part 1, faster
 *     [5] Modes                [5.1] text in and out  [5.2] chat format and likelihood
 *                              [5.3] sessions  [5.4] tools  [5.5] decoders  [5.6] generate
 *                              [5.7] chat  [5.8] explain  [5.9] tokenize, logits, eval
 *                              [5.10] compress  [5.11] check  [5.12] bench  [5.13] each
 *                              [5.14] schema
 *     [6] The command line     options, modes, signals, main
 *
 * The same bytes everywhere: for one model file and one token sequence the logits are bit-identical
 * whatever the thread count, instruction set and compiler, and however it is cut into batches.
 * Every sum has a fixed order (SIMD does many side by side), products and sums are never fused, and
 * functions such as exp are written here from basic operations, as C libraries' last bits differ.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // MAP_ANONYMOUS, MAP_NORESERVE, madvise
#endif
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <wchar.h>
#include <unistd.h>
#if defined PORTABLE && defined __x86_64__
#include <cpuid.h>
#elif defined PORTABLE
#include <sys/auxv.h>
#endif

#define VERSION "0.9"

// (FLT_EVAL_METHOD 16 is like 0, on machines that have half-precision arithmetic as well.)
#if defined __FAST_MATH__ || (FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16)
#error "run.c needs IEEE float32 arithmetic: no -ffast-math; on 32-bit x86 add -msse2 -mfpmath=sse"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "run.c reads little-endian files in place: this machine is big-endian"
#endif

// =================================================================================================
// [1] The model
// =================================================================================================
//
// How the next token is made (default model: dim 576, 30 layers, 9 query, 3 key/value heads of
// head_dim 64, vocab_size 49152). W x: matrix times vector; *: number by number; norm, act: [1.2].
//
//     token                                    a number that stands for a piece of text
//     x (dim) = its row of the embedding       what the token means, as a vector
//     in each layer:
//         xb = norm(x)
//         q, k, v = wq xb, wk xb, wv xb        query, key and value, for each head (head_dim)
//         x += wo attention(q, k, v)           tokens talk: each sees the k, v of those before it
//         xb = norm(x)
//         x += w_down (act(w_gate xb) * w_up xb)   feed-forward: each token thinks by itself
//     logits (vocab_size) = classifier norm(x)   a score for every token of the vocabulary
//     next token                               drawn at random with probabilities softmax(logits)
//
// x is the residual stream. The halves of a layer, attention and feed-forward, only add to it: what
// was written before stays readable, and each learns only what is still missing. A head is one of
// several attentions ([1.4]) side by side, with its own slice, head_dim numbers, of q, k and v.
//
// All that a model knows is in its matrices. They began as random numbers. Training showed the
// model text and nudged every number so that the actual next token became likelier, again and
// again. What the layers do with a text was learned in this way, and written by nobody; this part
// is only the frame. (What it takes from other parts it declares.)

// ---- [1.1] parameters ---------------------------------------------------------------------------
// A checkpoint is a file with the sizes first and the matrices after them. To load it is to map it
// into memory and to note where each matrix begins: load_model in [2.6]. However a matrix is stored
// ([2.2]), weight gives w[row][col]. A vector is one row of float32. Where a family of models does
// not have a matrix, its data is NULL.
typedef struct { int dtype, rows, cols; const uint8_t *data; } Matrix;
static float weight(const Matrix *w, int row, int col);
static const float *vec(const Matrix *w) { return (const float *)(const void *)w->data; }

typedef struct {
    int32_t dim;             // width of the residual stream
    int32_t hidden_dim;      // width of the feed-forward half
    int32_t n_layers;
    int32_t n_heads;         // query heads
    int32_t n_kv_heads;      // key/value heads; n_heads / n_kv_heads query heads share one
    int32_t vocab_size;
    int32_t seq_len;         // longest context the model was made for
    int32_t head_dim;        // width of a head
    float norm_eps;
    uint32_t flags;          // what is special about a family: see below
    int32_t activation;      // SILU or another
    float embed_scale;       // the embedding is multiplied by it
    float attn_scale;        // 1 / sqrt(head_dim), times query . key, which grows with head_dim
    int32_t sliding_window;  // local layers see this many positions, themselves included; 0: all
    uint8_t local_layers[32];  // bit l: layer l is local
    float attn_cap, logit_cap;  // scores, logits are kept within +-cap (Gemma 2); 0: as they are
    float query_growth;      // queries grow with log(pos / query_length) (Ministral 3)
    int32_t query_length;    // before this position they do not
    float act_limit;         // gate and up of experts are kept within it (GPT-OSS); 0: as they are
    int32_t n_experts, n_shared;  // in a layer ([1.5]); the last n_shared are visited by all tokens
    int32_t n_active;        // how many of the others a token visits
    int32_t expert_hidden;   // width of an expert
} Config;
enum { SILU, GELU_TANH, GELU, RELU_SQUARED, GELU_SIGMOID, N_ACTIVATIONS };
enum {                     // flags
    CENTERED = 1,          // norms first subtract the mean (GPT-2)
    PARALLEL = 2,          // the feed-forward half reads the x that attention read (GPT-NeoX)
    WIDE_NORMS = 4,        // q_norm and k_norm are of all heads together (OLMo 2)
    NORM_AFTER_ROPE = 8,   // and come after RoPE (Hunyuan)
    SIGMOID_ROUTER = 16,   // experts are scored one by one, not against each other (GLM 4.5)
    FULL_SHARES = 32       // the shares of the experts that a token visits add up to 1 (Mixtral)
};
// With a router: n_experts of w_gate to b_down, one after the other; expert_hidden for hidden_dim.
typedef struct {
    Matrix attn_norm, ffn_norm, attn_norm_bias, ffn_norm_bias;  // (dim) (biases: GPT-2)
    Matrix wq;              // (n_heads * head_dim, dim)
    Matrix wk, wv;          // (n_kv_heads * head_dim, dim)
    Matrix wo;              // (dim, n_heads * head_dim)
    Matrix bq, bk, bv, bo;  // biases of the four, added after the product (Qwen2)
    Matrix q_norm, k_norm;  // (head_dim) of each query, key (Qwen3), or of all heads: WIDE_NORMS
    Matrix sinks;           // (n_heads) (GPT-OSS)
    Matrix w_gate, w_up;    // (hidden_dim, dim); w_up NULL: nothing is gated (GPT-2)
    Matrix w_down;          // (dim, hidden_dim)
    Matrix b_gate, b_up, b_down;           // biases of the three
    Matrix post_attn_norm, post_ffn_norm;  // (dim) (Gemma 3)
    Matrix router;          // (n_experts, dim) (Mixtral)
    Matrix router_bias, choice_bias;       // (n_experts); the latter is for the choice alone
} Layer;

typedef struct {
    Config c;
    Matrix rope_freqs;       // (head_dim / 2) frequencies, always there: 0 where nothing turns
    Matrix rope_freqs_local;  // those of local layers
    Matrix token_embedding, classifier;   // (vocab_size, dim); one and the same in some models
    Matrix position_embedding;            // (seq_len, dim) (GPT-2)
    Layer *layers;           // (n_layers) steps of the computation, one after the other
    Matrix final_norm, final_norm_bias;   // (dim)
    Matrix score;            // (dim) of a reward model, which has no classifier
    Matrix check_ids, check_norms, check_logits, check_cases;  // reference values for -m check
    struct Header *header;   // of the file; NULL: one of github.com/karpathy/llama2.c, without any
    const char *path;
    const uint8_t *file;     // the mapped file
    size_t file_size;
    uint8_t *packed;         // what had to be rearranged
} Model;

static bool is_local(const Config *c, int layer) {
    return c->sliding_window && c->local_layers[layer / 8] >> layer % 8 & 1;
}

// ---- [1.2] mathematics --------------------------------------------------------------------------
// Five functions of arrays. What is only declared is in [2.1], [2.3]; sum16 has 16 partial sums.
static inline float exp_(float x);                                // e^x
static inline float gelu(float x);                                // x P(x): see 5
static void center(float *x, int n);                              // x[i] -= mean of x (LayerNorm)
static void soft_cap(float *x, int n, float cap);                 // x[i] = cap tanh(x[i] / cap)
static void grow_query(const Config *c, float *q, int n, int pos);  // see query_growth
static void exp_all(float *x, int n, float minus);                // x[i] = e^(x[i] - minus)
static void cos_sin(double x, float *cosine, float *sine);
static float sum16(const float *x, const float *y, int n);        // sum of x[i] y[i]; y NULL: x[i]
static float largest(const float *x, int n);
static int argmax(const float *x, int n);                         // where the largest is

// 1. The matrix product, y = W x: y[r] = sum over c of w[r][c] * x[c]. A row of W says how much of
// each number of x goes into one number of y. Nearly all parameters and all time are here. Where W
// is quantized, its numbers are small integers times a scale; x is rounded to such numbers as well
// (xq), so that the products are of integers, whose sums are exact: quantized_row.
typedef struct { int8_t *q; float *d, *dsum; int32_t *minus8; } Quantized;  // x = d * q: [2.3]
static void quantize(const Quantized *out, int i, const float *x, int n);
static bool is_quantized(const Matrix *w);
static float quantized_row(float sum, const Matrix *w, int row, const Quantized *x, int i);
// Returns sum + w[row] x. Row i of xq is the same x, rounded, for quantized matrices.
static float row_times(float sum, const Matrix *w, int row, const float *x, const Quantized *xq,
                       int i) {
    if (is_quantized(w)) return quantized_row(sum, w, row, xq, i);
    for (int c = 0; c < w->cols; c++) sum += weight(w, row, c) * x[c];
    return sum;
}

// 2. RMSNorm (arXiv:1910.07467): out[i] = w[i] * x[i] / sqrt(mean of x^2 + eps). It brings a vector
// to a standard length, whatever the layers have added up, and weights each number. out may be x.
static void rmsnorm(float *out, const float *x, const float *w, int n, float eps) {
    float scale = 1.0f / sqrtf(sum16(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = w[i] * (scale * x[i]);
}

// 3. Softmax turns scores into positive weights that add up to 1:
//     x[i] = e^(x[i] - max) / sum over j of e^(x[j] - max)
// A score that is larger by 1 weighs e = 2.7 times as much. Subtracting the maximum leaves the
// quotient unchanged, but e^x of a large x would overflow.
static void softmax(float *x, int n) {
    exp_all(x, n, largest(x, n));
    float scale = 1.0f / sum16(x, NULL, n);
    for (int i = 0; i < n; i++) x[i] *= scale;
}

// 4. RoPE (arXiv:2104.09864), rotary positions. Attention, an average over tokens ([1.4]), does not
// see their order: "dog bites man" would be "man bites dog". So each pair (a, b) of numbers of a
// query or key is turned, like the hand of a clock, by an angle that grows with the position:
//     angle = pos * freq[j],  freq[j] = theta^(-2j / head_dim)   for pair j
//     (a, b) becomes (a cos - b sin, b cos + a sin)
// The product of a query and a key then depends on how far apart they are. The first pair turns by
// 1 radian per position, the last hardly at all: the larger theta (10000 or more), the longer the
// distances that can be told apart. Checkpoints hold the frequencies, and rows of wq and wk in an
// order that makes pairs neighbours (export.py). The table of a head has cos, cos, ... and -sin,
// sin, ..., so rope only adds: some compilers fuse a difference beside a sum, even if told not to.
static void rope_angles(float *table, const float *freq, int pos, int head_dim) {
    float *cosine = table, *sine = table + head_dim;
    for (int i = 0; i < head_dim; i += 2) {
        cos_sin((float)pos * freq[i / 2], &cosine[i], &sine[i + 1]);
        cosine[i + 1] = cosine[i];
        sine[i] = -sine[i + 1];
    }
}
static void rope(float *head, const float *table, int head_dim) {
    const float *cosine = table, *sine = table + head_dim;
    for (int i = 0; i < head_dim; i += 2) {
        float a = head[i], b = head[i + 1];
        head[i] = a * cosine[i] + b * sine[i];
        head[i + 1] = b * cosine[i + 1] + a * sine[i + 1];
    }
}

// 5. The activation function, act, and its gate (SwiGLU, arXiv:2002.05202): gate = act(gate) * up.
// All but RELU_SQUARED are near x for x well above 0 and near 0 well below, so a number of gate
// says whether one of up counts: an if, learned. Without a bend two matrices in a row could be one.
//     SILU: x / (1 + e^-x);  RELU_SQUARED: x^2, but 0 for x < 0;  GELU_SIGMOID: x / (1 + e^-1.702x)
//     GELU: x P(x), P(x) the probability that a normal variable is below x (arXiv:1606.08415)
//     GELU_TANH, nearly the same: x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
static void gated_activation(float *gate, const float *up, int n, int kind) {
    float by = kind == SILU ? -1.0f : -1.702f;
    if (kind == SILU || kind == GELU_SIGMOID)
        for (int i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + exp_(by * gate[i]));
    if (kind == GELU)
        for (int i = 0; i < n; i++) gate[i] = gelu(gate[i]);
    if (kind == GELU_TANH)
        for (int i = 0; i < n; i++) {
            float x = gate[i], u = 0.797884561f * (x + 0.044715f * (x * x * x));
            gate[i] = x / (1.0f + exp_(-2.0f * u));
        }
    if (kind == RELU_SQUARED)
        for (int i = 0; i < n; i++) gate[i] *= gate[i] > 0 ? gate[i] : 0;
    if (up)  // NULL: nothing is gated (GPT-2)
        for (int i = 0; i < n; i++) gate[i] *= up[i];
}

static void add(float *x, const float *y, int n) { for (int i = 0; i < n; i++) x[i] += y[i]; }
static void add_bias(float *x, const Matrix *b) { if (b && b->data) add(x, vec(b), b->cols); }

// ---- [1.3] a batch on its way -------------------------------------------------------------------
// Read it first as if n were 1: the newest token of one text. But n are computed together, those of
// a prompt, or of many sequences, each a text with positions counted from 0.
enum { MAX_BATCH = 256 };  // slots that are computed at once
typedef struct { int token, pos, seq; bool want_logits; } Slot;  // one position to compute
typedef struct {           // the activations, numbers on their way: row i is at i * its width
    float *x;              // (n, dim)      the residual stream: what the layers read and add to
    float *xb;             // (n, dim)      what goes into half a layer, and what comes out
    float *q, *k, *v;      // (n, n_heads * head_dim), (n, n_kv_heads * head_dim) twice
    float *scores;         // (n, n_heads, scores_width) of attention, then weights
    float *att_out;        // (n, n_heads * head_dim)
    float *gate, *up;      // (n, hidden_dim), or (pairs of token and expert, expert_hidden)
    struct Experts *at;    // which tokens are at which expert: [2.7]
    float *rope, *rope_local;  // (n, 2, head_dim) cosines and sines, in global and local layers
    Quantized xq;          // the input of a matrix product, rounded
    float *logits;         // (slots that want them, vocab_size)
    int scores_width;
    size_t logits_room, scores_room;  // numbers that there is room for
} State;
static float *row_of(float *x, int i, int width) { return x + (size_t)i * (size_t)width; }

typedef struct Cache Cache;  // the KV cache: [1.4]
typedef struct {
    const Model *m;
    Cache *kv;
    State *s;
    const Slot *batch;
    int n, layer;
    const Layer *l;
} Pass;
typedef void Stage(const Pass *f, int i);  // a step for item i: a token, or a token's head

typedef void Task(void *context, int item);
static void parallel(Task *task, void *context, int n_items);  // each item, in any order, at once

// A watcher is shown the state after each stage, and the stage's name.
static void (*watch)(void *watcher, const Pass *f, const char *stage);
static void *watcher;
static void seen(const Pass *f, const char *stage) { if (watch) watch(watcher, f, stage); }

typedef struct { const Pass *f; Stage *stage; } EachJob;
static void each_task(void *context, int i) {
    const EachJob *job = context;
    job->stage(job->f, i);
}
static void each(const Pass *f, const char *name, int n, Stage *stage) {
    if (f->n > 1) parallel(each_task, &(EachJob){f, stage}, n);
    else for (int i = 0; i < n; i++) stage(f, i);  // a single token: too little to wake threads
    seen(f, name);
}

// Matrix products of n tokens, y (n, rows) = x (n, cols) W^T; xq holds x, rounded. Each row of W is
// a task. Usually part 4 sets matmul, and attention below, to functions that give the same bits.
typedef struct Product { Matrix w; float *y; int first, n; } Product;  // rows of x; n 0: all
typedef void Matmul(const Product *p, int n_products, const float *x, const Quantized *xq, int n);
typedef struct { const Product *p; const float *x; const Quantized *xq; int n; } ProductJob;
static Matmul quantize_all;  // rounds x into xq, if one of the matrices is quantized
static void row_task(void *context, int row) {
    const ProductJob *job = context;
    const Product *p = job->p;
    for (int i = p->first; i < p->first + (p->n ? p->n : job->n); i++)
        row_of(p->y, i, p->w.rows)[row] =
            row_times(0, &p->w, row, job->x + (size_t)i * (size_t)p->w.cols, job->xq, i);
}
static void matmul_plain(const Product *p, int n_products, const float *x, const Quantized *xq,
                         int n) {
    quantize_all(p, n_products, x, xq, n);
    for (int i = 0; i < n_products; i++)
        parallel(row_task, &(ProductJob){p + i, x, xq, n}, p[i].w.rows);
}
static Matmul *matmul = matmul_plain;
static void products(const Pass *f, const char *name, const float *x, const Product *p,
                     int n_products) {
    matmul(p, n_products, x, &f->s->xq, f->n);
    seen(f, name);
}

// ---- [1.4] attention and the cache --------------------------------------------------------------
// The KV cache has the keys and values of all positions so far. A token looks only at itself and
// the tokens before it. So what it computed, its keys and values in every layer, will never change
// when the text grows: they are kept, and a new token costs one pass, not the whole text again.
typedef struct { Cache *kv; int seq, layer, head; } CacheHead;  // one head of a sequence
static void cache_put(const CacheHead *h, int pos, const float *k, const float *v);
// scores[t] = q . k[t], for first <= t < n.
static void cache_scores(const CacheHead *h, const float *q, int first, int n, float *scores);
// out = sum over first <= t < n of weights[t] * v[t].
static void cache_average(const CacheHead *h, const float *weights, int first, int n, float *out);
static void get_scores(const Pass *f);  // memory for attention_plain's scores

// The first position that a token looks at: in local layers a window is all it sees.
static int first_seen(const Config *c, int layer, int pos) {
    int first = is_local(c, layer) ? pos + 1 - c->sliding_window : 0;
    return first > 0 ? first : 0;
}

// Attention of one query head of a token (arXiv:1706.03762). The query says what this token looks
// for, a key what a token offers, a value what it passes on. Query times key is large where they
// fit; softmax makes these scores weights; the result is the values' average, weighted by these:
//     weight = softmax over t of (q . k[t] * scale),     out = sum over t of weight[t] * v[t]
// Every head does this with a slice of its own, head_dim wide: one may look for the verb's subject
// while another looks at the word before. Query heads can share a key/value head, to keep the cache
// small. A sink, an extra score without a v, lets a head look at nothing.
static void attention_weights(const Pass *f, int head, float *scores, int first, int n) {
    const Matrix *sinks = &f->l->sinks;
    float cap = f->m->c.attn_cap;
    for (int t = first; t < n; t++) scores[t] *= f->m->c.attn_scale;
    if (cap > 0) soft_cap(scores + first, n - first, cap);
    if (sinks->data) scores[n] = vec(sinks)[head];
    softmax(scores + first, n - first + (sinks->data != NULL));
}
static void attend(const Pass *f, int item) {
    const Config *c = &f->m->c;
    int i = item / c->n_heads, head = item % c->n_heads, n = f->batch[i].pos + 1;
    int first = first_seen(c, f->layer, n - 1), kv_head = head / (c->n_heads / c->n_kv_heads);
    CacheHead h = {f->kv, f->batch[i].seq, f->layer, kv_head};
    float *weights = row_of(f->s->scores, item, f->s->scores_width);
    cache_scores(&h, row_of(f->s->q, item, c->head_dim), first, n, weights);
    attention_weights(f, head, weights, first, n);
    for (int t = 0; t < first; t++) weights[t] = 0;  // for watchers
    cache_average(&h, weights, first, n, row_of(f->s->att_out, item, c->head_dim));
}
static void attention_plain(const Pass *f) {
    get_scores(f);
    parallel(each_task, &(EachJob){f, attend}, f->n * f->m->c.n_heads);
}
static void (*attention)(const Pass *f) = attention_plain;

// ---- [1.5] forward ------------------------------------------------------------------------------
// The stages of a pass, each for one token.
static State *get_state(Cache *kv, int wanted);  // with room for the logits of that many slots
static void cache_prepare(Cache *kv, const Slot *batch, int n);  // memory for what will be written
static void check_numbers(const Cache *kv, const float *logits, int n);  // dies if NaN or infinite

// A token becomes a vector, its row of the embedding. Its position's angles serve all layers.
static void embed(const Pass *f, int i) {
    const Config *c = &f->m->c;
    const Matrix *positions = &f->m->position_embedding;
    float *x = row_of(f->s->x, i, c->dim);
    int pos = f->batch[i].pos, hd = c->head_dim;
    for (int j = 0; j < c->dim; j++)
        x[j] = weight(&f->m->token_embedding, f->batch[i].token, j) * c->embed_scale;
    for (int j = 0; j < c->dim && positions->data; j++) x[j] += weight(positions, pos, j);
    rope_angles(row_of(f->s->rope, i, 2 * hd), vec(&f->m->rope_freqs), pos, hd);
    rope_angles(row_of(f->s->rope_local, i, 2 * hd), vec(&f->m->rope_freqs_local), pos, hd);
}

// xb = norm(x), before attention, feed-forward and classifier. x may be xb.
static void norm(const Pass *f, int i, float *x, const Matrix *w, const Matrix *bias) {
    int dim = f->m->c.dim;
    float *xb = row_of(f->s->xb, i, dim);
    memmove(xb, row_of(x, i, dim), (size_t)dim * sizeof(float));
    if (f->m->c.flags & CENTERED) center(xb, dim);
    if (w->data) rmsnorm(xb, xb, vec(w), dim, f->m->c.norm_eps);
    add_bias(xb, bias);
}

// x += xb: what half a layer found (Gemma 3 brings it to a standard length first). After attention,
// xb becomes what the feed-forward half reads: x, or with PARALLEL x as it was.
static void add_to_stream(const Pass *f, int i, const Matrix *bias, const Matrix *post_norm) {
    const Config *c = &f->m->c;
    float *xb = row_of(f->s->xb, i, c->dim), *x = row_of(f->s->x, i, c->dim);
    add_bias(xb, bias);
    if (post_norm->data) rmsnorm(xb, xb, vec(post_norm), c->dim, c->norm_eps);
    for (int j = 0; j < c->dim; j++) {
        float before = x[j];
        x[j] += xb[j];
        xb[j] = c->flags & PARALLEL ? before : x[j];
    }
}

// Norm and position of queries, or keys: x (len), head after head. w is of one head, or of all.
static void norm_and_rope(const Config *c, float *x, int len, const Matrix *w, const float *table) {
    bool late = c->flags & NORM_AFTER_ROPE;
    for (int h = 0; h < len && late; h += c->head_dim) rope(x + h, table, c->head_dim);
    for (int h = 0; h < len && w->data; h += w->cols)
        rmsnorm(x + h, x + h, vec(w), w->cols, c->norm_eps);
    for (int h = 0; h < len && !late; h += c->head_dim) rope(x + h, table, c->head_dim);
}

// Finishes queries and keys (bias, norm, position), and puts keys and values into the cache.
static void position(const Pass *f, int i) {
    const Config *c = &f->m->c;
    const Layer *l = f->l;
    int hd = c->head_dim, q_dim = c->n_heads * hd, kv_dim = c->n_kv_heads * hd;
    float *q = row_of(f->s->q, i, q_dim), *k = row_of(f->s->k, i, kv_dim);
    float *v = row_of(f->s->v, i, kv_dim);
    const float *angles = row_of(is_local(c, f->layer) ? f->s->rope_local : f->s->rope, i, 2 * hd);
    add_bias(q, &l->bq), add_bias(k, &l->bk), add_bias(v, &l->bv);
    norm_and_rope(c, q, q_dim, &l->q_norm, angles);
    norm_and_rope(c, k, kv_dim, &l->k_norm, angles);
    int pos = f->batch[i].pos;
    grow_query(c, q, q_dim, pos);
    for (int h = 0; h < c->n_kv_heads; h++, k += hd, v += hd)
        cache_put(&(CacheHead){f->kv, f->batch[i].seq, f->layer, h}, pos, k, v);
}
static void attention_in(const Pass *f, int i) {
    norm(f, i, f->s->x, &f->l->attn_norm, &f->l->attn_norm_bias);
}
static void feed_forward_in(const Pass *f, int i) {
    add_to_stream(f, i, &f->l->bo, &f->l->post_attn_norm);
    norm(f, i, f->s->xb, &f->l->ffn_norm, &f->l->ffn_norm_bias);
}
static void activate(const Pass *f, int i) {
    int n = f->l->w_gate.rows;
    float *gate = row_of(f->s->gate, i, n), *up = f->l->w_up.data ? row_of(f->s->up, i, n) : NULL;
    add_bias(gate, &f->l->b_gate), add_bias(up, &f->l->b_up);
    gated_activation(gate, up, n, f->m->c.activation);
}
static void feed_forward_out(const Pass *f, int i) {
    const Matrix *bias = f->l->router.data ? NULL : &f->l->b_down;  // experts have added their own
    add_to_stream(f, i, bias, &f->l->post_ffn_norm);
}
static void last(const Pass *f, int i) {
    norm(f, i, f->s->x, &f->m->final_norm, &f->m->final_norm_bias);
}

// Experts (arXiv:1701.06538): many feed-forward halves, of which each token visits a few, so that a
// model can know much more than it reads for one token. A router, which has a row for each expert,
// as the classifier has for each token, scores how well they fit x. Those with the highest scores
// are visited, and x gets the sum of their answers, each times its share, made from its score.
static void experts(const Pass *f);  // xb = sum over e of share[e] * expert e of xb: [2.7]

// Attention: tokens talk. What a token asks, offers and passes on is read off its x; what the heads
// bring back, side by side, goes through wo to the residual stream. Feed-forward: each token thinks
// by itself. A row of w_gate looks for something in x; where it is found, a column of w_down adds
// what is known about it, and w_up says how much.
static void layer(const Pass *f) {
    const Layer *l = f->l;
    State *s = f->s;
    Product qkv[] = {{.w = l->wq, .y = s->q}, {.w = l->wk, .y = s->k}, {.w = l->wv, .y = s->v}};
    Product hidden[] = {{.w = l->w_gate, .y = s->gate}, {.w = l->w_up, .y = s->up}};
    each(f, "attention_in", f->n, attention_in);
    products(f, "wq wk wv", s->xb, qkv, 3);
    each(f, "position", f->n, position);
    attention(f);
    seen(f, "attend");
    products(f, "wo", s->att_out, &(Product){.w = l->wo, .y = s->xb}, 1);
    each(f, "feed_forward_in", f->n, feed_forward_in);
    if (l->router.data) experts(f);
    else {
        products(f, "w_gate w_up", s->xb, hidden, l->w_up.data ? 2 : 1);
        each(f, "activate", f->n, activate);
        products(f, "w_down", s->gate, &(Product){.w = l->w_down, .y = s->xb}, 1);
    }
    each(f, "feed_forward_out", f->n, feed_forward_out);
}

// Runs up to MAX_BATCH slots through the layers, and those that want logits through the classifier:
// every token of the vocabulary has a row there, and the better it fits the x that the layers have
// made, the higher its logit. Returns how many slots wanted logits.
static int forward_batch(Pass *f, float *logits) {
    int wanted = 0, dim = f->m->c.dim;
    f->layer = -1;
    each(f, "embed", f->n, embed);
    for (f->layer = 0; f->layer < f->m->c.n_layers; f->layer++) {
        f->l = &f->m->layers[f->layer];
        layer(f);
    }
    for (int i = 0; i < f->n; i++)
        if (f->batch[i].want_logits)
            memmove(row_of(f->s->x, wanted++, dim), row_of(f->s->x, i, dim), (size_t)dim * 4);
    f->n = wanted;
    if (!wanted) return 0;
    each(f, "last", wanted, last);
    products(f, "classifier", f->s->xb, &(Product){.w = f->m->classifier, .y = logits}, 1);
    if (f->m->c.logit_cap > 0) soft_cap(logits, wanted * f->m->c.vocab_size, f->m->c.logit_cap);
    return wanted;
}

// The logits (wanted, vocab_size) of the slots that want them, in order, valid until the next call.
// Positions before a slot must be in the cache or the batch, a sequence's slots in ascending order.
static float *forward(const Model *m, Cache *kv, const Slot *batch, int n) {
    int wanted = 0, done = 0;
    for (int i = 0; i < n; i++) wanted += batch[i].want_logits;
    Pass f = {.m = m, .kv = kv, .s = get_state(kv, wanted)};
    cache_prepare(kv, batch, n);
    for (int i = 0; i < n; i += MAX_BATCH) {
        f.batch = batch + i, f.n = n - i < MAX_BATCH ? n - i : MAX_BATCH;
        done += forward_batch(&f, f.s->logits + (size_t)done * (size_t)m->c.vocab_size);
    }
    check_numbers(kv, f.s->logits, wanted);
    return f.s->logits;
}

// ---- [1.6] the sampler --------------------------------------------------------------------------
// Draws the next token. With the same seed it draws what llama2.c draws.
typedef struct { float p; int token; } Candidate;
typedef struct {
    float temperature;      // 0: always the likeliest token; 1: as the model says; more: bolder
    float top_p;            // draw from the likeliest that together exceed this; 0, 1: off
    int top_k;              // draw from the k likeliest; 0: off
    float min_p;            // draw from those at least min_p times as likely as the best; 0: off
    float repeat_penalty;   // logits of tokens in the text are made worse by this factor; 1: off
    int repeat_last;        // only the text's last so many tokens; 0: all
    float dry;              // how much worse is what would go on repeating a passage; 0: off
    uint64_t rng;           // state of the random generator
    float coin;             // the random number of the last draw
    const uint8_t *forbidden;  // (vocab_size) 1: a token that must not be drawn; NULL: all may
    int kept;               // how many candidates it drew from; 0: all tokens, in order of ids
    float *p;               // (vocab_size) probabilities; at temperature 0 the logits
    Candidate *candidates;  // (vocab_size)
    int vocab_size;
} Sampler;
// xorshift* (https://en.wikipedia.org/wiki/Xorshift#xorshift*): 32 random bits; a float in [0, 1).
static uint32_t random_u32(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (uint32_t)(*state * 0x2545F4914F6CDD1Du >> 32);
}
static float random_f32(uint64_t *state) { return (float)(random_u32(state) >> 8) / 16777216.0f; }

// Makes less likely what would repeat the text.
static void sample_repeats(Sampler *s, const float *logits, const int *text, int n);
// Draws from the likeliest tokens only: now and then one of the many others would spoil the text.
static int sample_candidates(Sampler *s);

// Draws a token from logits (vocab_size); text (n) is what must not be repeated too much.
// Temperature T divides the logits before the softmax. A low one sharpens, a high one levels:
// logits 2 and 1 mean 73% and 27%, but at T = 0.5, where they become 4 and 2, 88% and 12%.
static int sample(Sampler *s, const float *logits, const int *text, int n) {
    memcpy(s->p, logits, (size_t)s->vocab_size * sizeof(float));
    sample_repeats(s, logits, text, n);
    for (int i = 0; s->forbidden && i < s->vocab_size; i++)
        if (s->forbidden[i]) s->p[i] = -INFINITY;
    int best = argmax(s->p, s->vocab_size);
    if (s->temperature == 0) return best;
    float max = s->p[best], cdf = 0;  // without max, the quotient may overflow
    for (int i = 0; i < s->vocab_size; i++) s->p[i] = (s->p[i] - max) / s->temperature;
    softmax(s->p, s->vocab_size);
    for (int i = 0; s->forbidden && i < s->vocab_size; i++)
        if (s->forbidden[i]) s->p[i] = 0;  // exp_ may leave a tiny rest
    s->coin = random_f32(&s->rng);
    s->kept = 0;
    if ((s->top_p > 0 && s->top_p < 1) || s->top_k || s->min_p > 0) return sample_candidates(s);
    for (int i = 0; i < s->vocab_size; i++) {
        cdf += s->p[i];
        if (s->coin < cdf) return i;
    }
    return s->forbidden ? best : s->vocab_size - 1;  // the sum was rounded down
}

// ---- [1.7] generate -----------------------------------------------------------------------------
// And so a text grows. Of tokens[0..n) the first n_prompt, at least 1, are given, the others are
// drawn. Only a test runs this loop; the program's own loop, in [5.6], prints as it goes, lets many
// texts grow at once, and ends one when the end token is drawn: in training it followed every text.
void generate_tokens(const Model *m, Cache *kv, Sampler *s, int *tokens, int n_prompt, int n) {
    for (int pos = 0; pos + 1 < n; pos++) {
        bool given = pos + 1 < n_prompt;  // the model reads it, but need not guess it
        float *logits = forward(m, kv, &(Slot){tokens[pos], pos, 0, !given}, 1);
        if (!given) tokens[pos + 1] = sample(s, logits, tokens, pos + 1);
    }
}

// =================================================================================================
// [2] Numbers and files
// =================================================================================================

// ---- [2.1] numbers ------------------------------------------------------------------------------
// Only + - * / and sqrtf, which IEEE 754 rounds the same way everywhere; sums in a fixed order.

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static const float *floats(const void *p) { return p; }
static const uint16_t *halves(const void *p) { return p; }
static uint32_t read_u32(const uint8_t *p) { uint32_t u; memcpy(&u, p, 4); return u; }
static int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Half precision to float: exponent and mantissa move over, a product with 2^112 mends the exponent
// (and makes subnormal halves normal); infinity and NaN keep an exponent of all ones.
static inline float half_to_float(uint16_t h) {
    float x = float_of((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return float_of(bits_of(x) | special | (uint32_t)(h & 0x8000) << 16);
}

// Float to half precision, to nearest even, saturating at 65504 (NaN becomes 65504).
static inline uint16_t float_to_half(float x) {
    x = x < 65504.0f ? x : 65504.0f;
    x = x > -65504.0f ? x : -65504.0f;
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
    uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3f000000;  // below 2^-14: multiples of 2^-24
    return (uint16_t)(sign | (a < 0x38800000 ? small : normal));
}

// e^x to about 1 ulp (Cephes expf): x = n ln2 + r, e^x = 2^n e^r, and e^r is a polynomial, written
// as a tree. n + 1.5 * 2^23 rounds n to an integer and shows it in the lowest bits. (+ (x - x): of
// NaN it is NaN.)
static inline float exp_(float x) {
    float most = x > 88.0f ? 88.0f : x;  // (To change x twice takes GCC 12 twice the steps.)
    x = x < -87.0f ? -87.0f : most;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f - n * -2.12194440e-4f, r2 = r * r;
    float p = ((1.9875691500e-4f * r + 1.3981999507e-3f) * r2 +
               (8.3334519073e-3f * r + 4.1665795894e-2f)) * r2 +
              (1.6666665459e-1f * r + 5.0000001201e-1f);
    uint32_t power = (bits_of(shifted) - 0x4b400000u) << 23;
    return float_of(bits_of(p * r2 + r + 1.0f) + power) + (x - x);
}
static void exp_all(float *x, int n, float minus) {
    for (int i = 0; i < n; i++) x[i] = exp_(x[i] - minus);
}
// The normal distribution is within 1e-7 by equation 7.1.26 of Abramowitz and Stegun.
static inline float gelu(float x) {
    float t = 1.0f / (1.0f + 0.231641888f * fabsf(x)), p = 1.061405429f * t - 1.453152027f;
    p = 0.5f * t * (((p * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f);
    return x * (x > 0 ? 1.0f - p * exp_(-0.5f * x * x) : p * exp_(-0.5f * x * x));
}

// e^x in double for |x| < 700: (e^(x/1024))^1024 with a short Taylor series.
static double exp_double(double x) {
    double y = x / 1024, term = 1, sum = 1;
    for (int i = 1; i < 14; i++) sum += term *= y / i;
    for (int i = 0; i < 10; i++) sum *= sum;
    return sum;
}

// Natural logarithm of x > 0: x = 2^e m, ln m = 2 artanh((m - 1) / (m + 1)).
static double log_(double x) {
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752) m *= 2, e--;
    double f = (m - 1) / (m + 1), f2 = f * f, sum = 0;
    for (int i = 21; i > 0; i -= 2) sum = sum * f2 + 1.0 / i;
    return 2 * f * sum + e * 0.69314718055994531;
}

// Cosine and sine of x >= 0 in double: x = k pi/2 + r, then Taylor series and the quadrant, which
// the lowest bits of k + 1.5 * 2^52 show.
static void cos_sin(double x, float *cosine, float *sine) {
    double shifted = x * 0.63661977236758134 + 6755399441055744.0, k = shifted - 6755399441055744.0;
    double r = x - k * 1.57079632673412561417 - k * 6.07710050650619224932e-11, r2 = r * r;
    double s = 0, c = 0;
    for (int i = 15; i > 1; i -= 2) s = (s + 1) * -r2 / (i * (i - 1));
    for (int i = 16; i > 1; i -= 2) c = (c + 1) * -r2 / (i * (i - 1));
    s = r * (s + 1), c = c + 1;
    int quadrant = (int)(read_u32((const uint8_t *)&shifted) & 3);
    *cosine = (float)(quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s);
    *sine = (float)(quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c);
}

// A sum of many numbers is made of 16 partial sums, number i in sum i mod 16, so that a SIMD unit
// can do them side by side, and the order is the same on every machine.
static float sum16(const float *x, const float *y, int n) {
    float sums[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += y ? x[i + j] * y[i + j] : x[i + j];
    for (; i < n; i++) sums[i % 16] += y ? x[i] * y[i] : x[i];
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++) sums[j] += sums[j + width];
    return sums[0];
}
static void center(float *x, int n) {
    float mean = sum16(x, NULL, n) / (float)n;
    for (int i = 0; i < n; i++) x[i] -= mean;
}
static void soft_cap(float *x, int n, float cap) {
    for (int i = 0; i < n; i++) x[i] = cap * (1.0f - 2.0f / (1.0f + exp_(2.0f * x[i] / cap)));
}
// Attention over a long text may have to get sharper.
static void grow_query(const Config *c, float *q, int n, int pos) {
    int lengths = c->query_growth > 0 ? pos / c->query_length : 0;
    float size = lengths ? c->query_growth * (float)log_(1 + lengths) : 0;
    for (int i = 0; i < n && size > 0; i++) q[i] *= 1.0f + size;
}
// Bits of floats are integers in the same order, but that negative ones have to be turned around.
static float largest(const float *x, int n) {
    int32_t max = INT32_MIN;
    for (int i = 0; i < n; i++) {
        int32_t u = (int32_t)bits_of(x[i]);
        u ^= u < 0 ? INT32_MAX : 0;
        max = u > max ? u : max;
    }
    return float_of((uint32_t)(max ^ (max < 0 ? INT32_MAX : 0)));
}
static int argmax(const float *x, int n) {
    float max = largest(x, n);
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p == y->p ? x->token - y->token : x->p > y->p ? -1 : 1;
}
// Tokens below a cutoff cannot be drawn, and need not be sorted. For the k likeliest it is a power
// of two that a count of the probabilities' exponents leaves. The probabilities left do not add up
// to 1: the random number is scaled to their sum.
static int sample_candidates(Sampler *s) {
    Candidate *c = s->candidates;
    bool nucleus = s->top_p > 0 && s->top_p < 1;
    int n = 0, counts[256] = {0}, exponent = 255, vocab = s->vocab_size;
    float max = largest(s->p, vocab), least = s->min_p * max, sum = 0, all = 1;
    float cutoff = s->top_k ? 0 : least;
    if (nucleus && !s->top_k)
        cutoff = fmaxf(cutoff, fminf((1.0f - s->top_p) / (float)(vocab - 1), max));
    for (int i = 0; i < vocab && s->top_k; i++) counts[bits_of(s->p[i]) >> 23 & 255]++;
    for (int some = counts[255]; some < s->top_k && exponent; some += counts[--exponent]) {}
    if (s->top_k) cutoff = fmaxf(cutoff, float_of((uint32_t)exponent << 23));
    for (int i = 0; i < vocab; i++)
        if (s->p[i] >= cutoff) c[n++] = (Candidate){s->p[i], i};
    qsort(c, (size_t)n, sizeof *c, by_probability);
    if (s->top_k && n > s->top_k) n = s->top_k;
    if (s->top_k) all = 0;  // top-p is a part of what top-k has left
    for (int i = 0; i < n && s->top_k; i++) all += c[i].p;
    for (s->kept = 0; s->kept < n && !(nucleus && sum > s->top_p * all); s->kept++) {
        if (c[s->kept].p < least) break;
        sum += c[s->kept].p;
    }
    float cdf = c[0].p;
    for (n = 0; n < s->kept - 1 && s->coin * sum >= cdf;) cdf += c[++n].p;
    return c[n].token;
}

// The repetition penalty (arXiv:1909.05858), of each token once. DRY, "don't repeat yourself" (by
// p-e-w, 2024): where the text's last L tokens, two or more, have occurred before, the logit of the
// token that followed then is lowered by dry * 1.75^(L - 2).
static void sample_repeats(Sampler *s, const float *logits, const int *text, int n) {
    Candidate *less = s->candidates;  // (vocab_size) of each token
    int recent = s->repeat_last && s->repeat_last < n ? s->repeat_last : n;
    for (int i = n - recent; i < n && s->repeat_penalty != 1; i++) {
        float l = logits[text[i]];
        s->p[text[i]] = l > 0 ? l / s->repeat_penalty : l * s->repeat_penalty;
    }
    if (s->dry <= 0) return;
    for (int i = 1; i < n; i++) less[text[i]].p = 0;
    for (int i = n - 1; i > 1; i--) {
        int same = 0;
        float by = s->dry;
        while (same < 50 && same < i && text[i - 1 - same] == text[n - 1 - same]) same++;
        for (int k = 2; k < same; k++) by *= 1.75f;
        if (same >= 2) less[text[i]].p = fmaxf(less[text[i]].p, by);
    }
    for (int i = 1; i < n; i++) {
        s->p[text[i]] -= less[text[i]].p;
        less[text[i]].p = 0;
    }
}

// 64-bit hash of bytes, the sum of a mix (splitmix64) of each 8-byte word with its place. `first`
// is the place of the first word: a hash over pieces is the sum of the pieces' sums.
static uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
static uint64_t hash_words(const void *data, size_t bytes, uint64_t first) {
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)data + i, bytes - i < 8 ? bytes - i : 8);
        sum += mix64(word + (first + i / 8 + 1) * 0x9E3779B97F4A7C15u);
    }
    return sum;
}
static uint64_t hash64(const void *data, size_t bytes) {
    return mix64(bytes) + hash_words(data, bytes, 0);
}

// ---- [2.2] matrices -----------------------------------------------------------------------------
// How a matrix lies in memory. Vectors (and llama2.c's files) are ROWS. All other dtypes come in
// panels of 16 rows, a number of each row side by side, so that a SIMD unit sums 16 rows at once,
// each in column order: F32, BF16 and HALF [cols][16]. Quantized panels are cut into blocks of 32
// columns: first the half-precision scales of the 16 rows, [16], for Q4A then minima, [16], then
// quants, 4 columns of a row side by side: Q8 int8 [8][16][4]; Q4 and Q4A [4][16][4], low halves of
// the bytes columns 0 to 15, high halves columns 16 to 31.

enum {          // how the numbers of a matrix are stored
    HALF = -1,  // half precision: only in the KV cache, in no file
    ROWS,       // float32, row by row
    F32,        // float32
    BF16,       // the upper half of a float32
    Q8,         // w = scale * q, q = -127..127, a scale for each 32 numbers of a row
    Q4,         // w = scale * q, q = -8..7
    Q4A,        // w = scale * q + minimum, q = 0..15
    BYTES,      // not a matrix: bytes
    N_DTYPES
};
enum { PANEL = 16, BLOCK = 32 };  // rows of a panel, columns of a block
static const char *const dtype_names[N_DTYPES] = {"f32", "f32", "bf16", "q8", "q4", "q4a", "bytes"};
static bool is_quantized(const Matrix *w) { return w->dtype >= Q8; }
static int blocks_of(int cols) { return (cols + BLOCK - 1) / BLOCK; }
static int scale_bytes(int dtype) { return dtype == Q4A ? 64 : 32; }
static int block_bytes(int dtype) { return scale_bytes(dtype) + (dtype == Q8 ? 512 : 256); }
static size_t panel_bytes(int dtype, int cols) {
    if (dtype >= Q8) return (size_t)blocks_of(cols) * (size_t)block_bytes(dtype);
    return (size_t)cols * (dtype == F32 ? 64 : 32);
}
static size_t matrix_bytes(int dtype, int rows, int cols) {
    if (dtype == BYTES) return (size_t)cols;
    if (dtype == ROWS) return (size_t)rows * (size_t)cols * 4;
    return ((size_t)rows + PANEL - 1) / PANEL * panel_bytes(dtype, cols);
}

// Where a row's panel begins; where number c of the row is, or its block, and in that its quant.
static const uint8_t *panel_of(const Matrix *w, int row) {
    return w->data + (size_t)(row / PANEL) * panel_bytes(w->dtype, w->cols);
}
static const uint8_t *place_of(const Matrix *w, int row, int c) {
    if (w->dtype == ROWS) return w->data + ((size_t)row * (size_t)w->cols + (size_t)c) * 4;
    const uint8_t *panel = panel_of(w, row);
    if (is_quantized(w)) return panel + c / BLOCK * block_bytes(w->dtype);
    return panel + ((size_t)c * PANEL + (size_t)(row % PANEL)) * (w->dtype == F32 ? 4 : 2);
}
static size_t quant_at(int dtype, int row, int c) {
    c %= dtype == Q8 ? 32 : 16;
    return (size_t)(scale_bytes(dtype) + (c / 4 * PANEL + row % PANEL) * 4 + c % 4);
}
// The integer of column c (0 to 31) of a block.
static int quant(int dtype, const uint8_t *block, int row, int c) {
    uint8_t q = block[quant_at(dtype, row, c)];
    if (dtype == Q8) return (int8_t)q;
    return (c < 16 ? q & 15 : q >> 4) - (dtype == Q4 ? 8 : 0);
}
static float weight(const Matrix *w, int row, int c) {
    const uint8_t *p = place_of(w, row, c);
    if (w->dtype == ROWS || w->dtype == F32) return *floats(p);
    if (w->dtype == HALF) return half_to_float(*halves(p));
    if (w->dtype == BF16) return float_of((uint32_t)*halves(p) << 16);
    float x = half_to_float(halves(p)[row % PANEL]) * (float)quant(w->dtype, p, row, c % BLOCK);
    return w->dtype == Q4A ? x + half_to_float(halves(p)[PANEL + row % PANEL]) : x;
}

// ---- [2.3] rounding to int8 ---------------------------------------------------------------------
// What quantized matrices are multiplied with: x = d * q by blocks of 32 numbers, q (blocks, 32), d
// (blocks), and with it d * sum of q (dsum), for weights with a minimum, and -8 * sum of q
// (minus8), for weights with an offset of 8. Blocks of 8 tokens lie side by side, as kernels read
// them: (tokens / 8, blocks, 8).

enum { TILE = 8 };
static size_t round_at(int token, int block, int n_blocks) {
    return ((size_t)(token / TILE) * (size_t)n_blocks + (size_t)block) * TILE +
           (size_t)(token % TILE);
}
static Quantized quantized_in(uint8_t *memory, int n, int cols) {  // laid out in 44 bytes a block
    size_t blocks = (size_t)round_up(n, TILE) * (size_t)blocks_of(cols);
    Quantized x = {.q = (int8_t *)memory, .d = (float *)(void *)(memory + blocks * BLOCK)};
    x.dsum = x.d + blocks;
    x.minus8 = (int32_t *)(void *)(x.dsum + blocks);
    return x;
}

// The scale with which the largest |x| becomes 127. Instead of a subnormal one it is 0; of an
// infinity or NaN it is NaN, so that the logits show it.
static inline float scale_of(const float *x, int n) {
    uint32_t max = 0;
    for (int i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        max = a > max ? a : max;
    }
    float d = float_of(max) / 127;
    return max >= 0x7f800000 ? NAN : d < FLT_MIN ? 0 : d;
}
// x / d as the nearest integer, halves to even; 0 where the scale is 0 or NaN.
static inline int32_t round_by(float x, float d) {
    float shifted = (d > 0 ? x * (1.0f / d) : 0.0f) + 12582912.0f;  // as in exp_
    return (int32_t)(bits_of(shifted) - 0x4b400000u);
}
static inline void round_block(const Quantized *out, size_t at, const float *x) {
    float d = scale_of(x, BLOCK);
    int8_t *q = out->q + at * BLOCK;
    int32_t sum = 0;
    for (int i = 0; i < BLOCK; i++) {
        int32_t v = round_by(x[i], d);
        q[i] = (int8_t)v;
        sum += v;
    }
    out->d[at] = d;
    out->minus8[at] = -8 * sum;
    out->dsum[at] = d * (float)sum;
}
// Rounds x (n), the numbers of a token, by blocks of 32.
static void quantize(const Quantized *out, int token, const float *x, int n) {
    float end[BLOCK] = {0};
    for (int b = 0; b * BLOCK < n; b++, x += BLOCK) {
        if (n - b * BLOCK < BLOCK) x = memcpy(end, x, (size_t)(n - b * BLOCK) * sizeof(float));
        round_block(out, round_at(token, b, blocks_of(n)), x);
    }
}
static void quantize_task(void *context, int item) {
    const ProductJob *job = context;
    int cols = job->p->w.cols, token = job->p->first + item;
    quantize(job->xq, token, job->x + (size_t)token * (size_t)cols, cols);
}
static void quantize_all(const Product *p, int n_products, const float *x, const Quantized *xq,
                         int n) {
    bool needed = false;
    for (int i = 0; i < n_products; i++) needed |= is_quantized(&p[i].w);
    for (int i = 0; i < n_products && needed; i++)
        if (i == 0 || p[i].first != p[i - 1].first)  // other rows than the product before
            parallel(quantize_task, &(ProductJob){p + i, x, xq, n}, p[i].n ? p[i].n : n);
}

// One row of a quantized matrix times the rounded numbers of a token: in integers within a block,
// then times the weight's scale, times the other's.
static float quantized_row(float sum, const Matrix *w, int row, const Quantized *x, int token) {
    const uint8_t *block = panel_of(w, row);
    for (int b = 0; b < blocks_of(w->cols); b++, block += block_bytes(w->dtype)) {
        size_t at = round_at(token, b, blocks_of(w->cols));
        int dot = 0;
        for (int c = 0; c < BLOCK; c++)
            dot += quant(w->dtype, block, row, c) * x->q[at * BLOCK + (size_t)c];
        sum += (float)dot * half_to_float(halves(block)[row % PANEL]) * x->d[at];
        if (w->dtype == Q4A) sum += half_to_float(halves(block)[PANEL + row % PANEL]) * x->dsum[at];
    }
    return sum;
}

// ---- [2.4] errors and memory --------------------------------------------------------------------
// An error is one line on stderr that says what, where and what to do; the exit status is 1. Memory
// comes from resize (like realloc) and zeros (aligned).

#define die(...) (tell(__VA_ARGS__), exit(1))
static __attribute__((format(printf, 1, 2))) void tell(const char *format, ...) {
    char line[3 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++)  // a terminal must not obey what files have brought
        if (*c == 127 || (uint8_t)*c < 32 || (*c == '\xc2' && (uint8_t)c[1] < 160)) *c = '?';
    fprintf(stderr, "run: %s\n", line);
}

static size_t memory_size(size_t count, size_t size) {
    if (size && count > SIZE_MAX / 2 / size) die("out of memory: %zu x %zu bytes", count, size);
    return count * size;
}
static void *resize(void *old, size_t count, size_t size) {
    size_t bytes = memory_size(count, size) + !(count && size);
    void *p = old ? realloc(old, bytes) : malloc(bytes);  // GCC 12's analyser knows them apart
    if (!p) die("out of memory: cannot get %zu bytes", bytes);
    return p;
}

// Zeroed memory at the start of a cache line, or of a page of 2 MiB, to be freed.
static void *zeros(size_t count, size_t size) {
    void *p = NULL;
    size_t bytes = memory_size(count, size) + 64, large_page = 1 << 21;
    if (posix_memalign(&p, bytes > large_page ? large_page : 64, bytes))
        die("out of memory: cannot get %zu bytes", bytes);
#ifdef MADV_HUGEPAGE
    if (bytes > large_page) madvise(p, bytes, MADV_HUGEPAGE);  // where the system has such pages
#endif
    return memset(p, 0, bytes);
}
static Quantized new_quantized(int n, int cols) {  // to be freed: its q
    size_t blocks = (size_t)round_up(n, TILE) * (size_t)blocks_of(cols);
    return quantized_in(zeros(blocks, BLOCK + 12), n, cols);
}

static double seconds_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static double seconds(void) { return seconds_of(CLOCK_MONOTONIC); }

// Maps a file for reading. A missing, unreadable or empty one ends the program.
static const uint8_t *map_file(const char *path, size_t *size) {
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // so that a pipe is an error and not a wait
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) die("cannot open %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s is not a file", path);
    if (st.st_size <= 0) die("%s is empty", path);
    *size = (size_t)st.st_size;
    void *data = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    close(fd);
    return data;
}

static volatile sig_atomic_t idle = 1;  // nothing is under way: a signal ends the program
static _Thread_local int this_thread;   // its number, from 0
#ifdef PLAIN
static const char isa[] = "plain C";
static void parallel(Task *task, void *context, int n) {
    for (int i = 0; i < n; i++) task(context, i);
}
static void start_threads(int n) { (void)n; }
static const uint8_t *map_weights(const char *path, size_t *size) { return map_file(path, size); }
#else
static const uint8_t *map_weights(const char *path, size_t *size);  // in large pages: [4.2]
#endif

// ---- [2.5] cache pages --------------------------------------------------------------------------
// A page has 256 positions of a sequence, all layers and heads, counted from the text's beginning.
// Of each head it holds the keys, a matrix of 256 rows, then the values, a matrix of 256 columns,
// then for quantized models a scale for each position's values (those in the matrix are 1). So
// attention is products of such matrices. A branch copies the table of pages; a page that several
// sequences have is copied when one of them writes to it.

enum { PAGE_POSITIONS = 256 };
typedef struct { int token, expert; } Guest;  // of a row; token -1: the row is empty
typedef struct Experts {  // [2.7]
    float *route, *share;  // (n, n_experts) scores of experts; what each counts, 0: not visited
    float *rows;           // (guests, dim) tokens at experts, and what these answer
    Guest *guest;          // (guests) who that is, sorted by expert
    Product *visits;       // (3 * n_experts) gate and up; down
} Experts;
struct Cache {
    const Model *m;
    int n_seqs, ctx;      // ctx: positions that each sequence has room for
    int dtype;            // how keys and values are stored
    int n_pages;          // the most that a sequence has
    size_t head_bytes, page_bytes;
    _Atomic bool damaged; // a key or a value was infinite or NaN
    uint8_t **pages;      // (n_seqs, n_pages), NULL: none yet; behind each how many others have it
    State state;          // the activations of forward
};

static uint8_t **page_of(const Cache *kv, int seq, int pos) {
    return &kv->pages[(size_t)seq * (size_t)kv->n_pages + (size_t)(pos / PAGE_POSITIONS)];
}
static int *others_of(const Cache *kv, uint8_t *page) {
    return (int *)(void *)(page + kv->page_bytes);
}
// Makes the pages of a batch its sequences' own, so that they can be written.
static void cache_prepare(Cache *kv, const Slot *batch, int n) {
    for (int i = 0; i < n; i++) {
        uint8_t **page = page_of(kv, batch[i].seq, batch[i].pos), *old = *page;
        if (old && !*others_of(kv, old)) continue;
        *page = zeros(1, kv->page_bytes + sizeof(int));
        if (!old) continue;
        memcpy(*page, old, kv->page_bytes);
        --*others_of(kv, old);
    }
}
static void cache_clear(Cache *kv, int seq) {
    for (int pos = 0; pos < kv->ctx; pos += PAGE_POSITIONS) {
        uint8_t **page = page_of(kv, seq, pos);
        if (*page && !(*others_of(kv, *page))--) free(*page);
        *page = NULL;
    }
}
// Sequence `to` now begins with the first n positions of another one, and has nothing else.
static void cache_branch(Cache *kv, int from, int to, int n) {
    cache_clear(kv, to);
    for (int pos = 0; pos < n; pos += PAGE_POSITIONS) {
        uint8_t *page = *page_of(kv, to, pos) = *page_of(kv, from, pos);
        if (page) ++*others_of(kv, page);
    }
}

static Matrix cache_keys(const Cache *kv, const uint8_t *head) {
    return (Matrix){kv->dtype, PAGE_POSITIONS, kv->m->c.head_dim, head};
}
static Matrix cache_values(const Cache *kv, const uint8_t *head) {
    size_t keys = matrix_bytes(kv->dtype, PAGE_POSITIONS, kv->m->c.head_dim);
    return (Matrix){kv->dtype, kv->m->c.head_dim, PAGE_POSITIONS, head + keys};
}
static float *value_scales(const Cache *kv, const uint8_t *head) {
    return (float *)(uintptr_t)(head + kv->head_bytes) - PAGE_POSITIONS;
}
// A head's part of the page that holds a position.
static const uint8_t *head_at(const CacheHead *h, int pos) {
    return *page_of(h->kv, h->seq, pos) +
           (size_t)(h->layer * h->kv->m->c.n_kv_heads + h->head) * h->kv->head_bytes;
}

static void cache_open(Cache *kv, const Model *m, int ctx, int n_seqs) {
    const Config *c = &m->c;
    State *s = &kv->state;
    int dtype = m->token_embedding.dtype, hd = c->head_dim, widest = 0;
    int widths[] = {c->dim, c->n_heads * hd, c->hidden_dim, c->expert_hidden};  // of products' x
    *kv = (Cache){.m = m, .n_seqs = n_seqs, .ctx = ctx, .n_pages = (ctx - 1) / PAGE_POSITIONS + 1};
    kv->dtype = dtype <= F32 ? F32 : dtype == BF16 ? HALF : Q8;
    kv->head_bytes = matrix_bytes(kv->dtype, PAGE_POSITIONS, hd) +
                     matrix_bytes(kv->dtype, hd, PAGE_POSITIONS) +
                     (kv->dtype == Q8 ? PAGE_POSITIONS * sizeof(float) : 0);
    kv->page_bytes = kv->head_bytes * (size_t)c->n_kv_heads * (size_t)c->n_layers;
    kv->pages = zeros((size_t)n_seqs * (size_t)kv->n_pages, sizeof *kv->pages);
    Experts *e = s->at = zeros(1, sizeof *e);
    int n = MAX_BATCH, guests = n * (c->n_active + c->n_shared) + TILE * c->n_experts;
    bool larger = (double)guests * c->expert_hidden > (double)n * c->hidden_dim;
    int gate_rows = larger ? guests : n, gate_width = larger ? c->expert_hidden : c->hidden_dim;
    const struct { float **array; int rows, width; } arrays[] = {
        {&s->x, n, c->dim}, {&s->xb, n, c->dim}, {&s->q, n, c->n_heads * hd},
        {&s->att_out, n, c->n_heads * hd}, {&s->k, n, c->n_kv_heads * hd},
        {&s->v, n, c->n_kv_heads * hd}, {&s->rope, n, 2 * hd}, {&s->rope_local, n, 2 * hd},
        {&e->route, n, c->n_experts}, {&e->share, n, c->n_experts}, {&e->rows, guests, c->dim},
        {&s->gate, gate_rows, gate_width}, {&s->up, gate_rows, gate_width}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        *arrays[i].array = zeros((size_t)arrays[i].rows * (size_t)arrays[i].width, sizeof(float));
    for (int i = 0; i < 4; i++) widest = widths[i] > widest ? widths[i] : widest;
    e->guest = zeros((size_t)guests, sizeof *e->guest);
    e->visits = zeros((size_t)c->n_experts, 3 * sizeof *e->visits);
    s->xq = new_quantized(n > guests ? n : guests, widest);
}
static void cache_close(Cache *kv) {
    State *s = &kv->state;
    for (int i = 0; i < kv->n_seqs; i++) cache_clear(kv, i);
    void *memory[] = {kv->pages, s->x, s->xb, s->q, s->k, s->v, s->att_out, s->gate, s->up, s->rope,
                      s->rope_local, s->xq.q, s->scores, s->logits, s->at->route, s->at->share,
                      s->at->rows, s->at->guest, s->at->visits, s->at};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    *kv = (Cache){0};
}

// Writes a number into a matrix, into one of Q8 divided by d and rounded; with a block's first one
// comes the scale, d.
static inline void put_number(const Matrix *w, int row, int c, float x, float d) {
    void *p = (void *)(uintptr_t)place_of(w, row, c);
    if (w->dtype == F32) *(float *)p = x;
    else if (w->dtype == HALF) *(uint16_t *)p = float_to_half(x);
    else ((int8_t *)p)[quant_at(Q8, row, c)] = (int8_t)round_by(x, d);
    if (w->dtype == Q8 && c % BLOCK == 0) ((uint16_t *)p)[row % PANEL] = float_to_half(d);
}
static void cache_put(const CacheHead *h, int pos, const float *k, const float *v) {
    const Cache *kv = h->kv;
    const uint8_t *data = head_at(h, pos);
    Matrix keys = cache_keys(kv, data), values = cache_values(kv, data);
    int at = pos % PAGE_POSITIONS, hd = kv->m->c.head_dim;
    float d_key = 0, d_value = scale_of(v, hd), by = 1;
    if (kv->dtype == Q8) {
        value_scales(kv, data)[at] = d_value > 0 ? d_value : 0;
        by = d_value > 0 ? 1.0f / d_value : 0;
    }
    for (int i = 0; i < hd; i++) {
        if (i % BLOCK == 0) d_key = scale_of(k + i, hd - i < BLOCK ? hd - i : BLOCK);
        if (d_key != d_key || d_value != d_value) h->kv->damaged = true;
        put_number(&keys, at, i, k[i], d_key);
        put_number(&values, i, at, v[i] * by, 1);
    }
}

static void cache_scores(const CacheHead *h, const float *q, int first, int n, float *scores) {
    int hd = h->kv->m->c.head_dim;
    Quantized rounded = new_quantized(1, hd);
    quantize(&rounded, 0, q, hd);
    for (int t = first; t < n; t++) {
        Matrix keys = cache_keys(h->kv, head_at(h, t));
        scores[t] = row_times(0, &keys, t % PAGE_POSITIONS, q, &rounded, 0);
    }
    free(rounded.q);
}
// Each page is a product of its values with the weights of its positions. Of quantized models the
// weights are first multiplied with the values' scales, and rounded.
static void cache_average(const CacheHead *h, const float *weights, int first, int n, float *out) {
    const Cache *kv = h->kv;
    int hd = kv->m->c.head_dim;
    Quantized rounded = new_quantized(1, PAGE_POSITIONS);
    for (int i = 0; i < hd; i++) out[i] = 0;
    for (int from = first - first % PAGE_POSITIONS; from < n; from += PAGE_POSITIONS) {
        const uint8_t *data = head_at(h, from);
        Matrix values = cache_values(kv, data);
        float x[PAGE_POSITIONS] = {0};
        for (int t = first > from ? first : from; t < n && t < from + PAGE_POSITIONS; t++)
            x[t - from] = weights[t] * (kv->dtype == Q8 ? value_scales(kv, data)[t - from] : 1);
        quantize(&rounded, 0, x, PAGE_POSITIONS);
        for (int i = 0; i < hd; i++) out[i] = row_times(out[i], &values, i, x, &rounded, 0);
    }
    free(rounded.q);
}

// Gives an array room for n numbers; what was in it is lost.
static void make_room(float **array, size_t *room, size_t n) {
    if (*array && n <= *room) return;
    *room = n + n / 4;
    free(*array);
    *array = resize(NULL, *room, sizeof(float));
}
static State *get_state(Cache *kv, int wanted) {
    State *s = &kv->state;
    make_room(&s->logits, &s->logits_room, (size_t)wanted * (size_t)kv->m->c.vocab_size);
    return s;
}
static void get_scores(const Pass *f) {
    State *s = f->s;
    s->scores_width = 0;
    for (int i = 0; i < f->n; i++)
        if (f->batch[i].pos + 2 > s->scores_width) s->scores_width = f->batch[i].pos + 2;  // a sink
    make_room(&s->scores, &s->scores_room,
              (size_t)(f->n * f->m->c.n_heads) * (size_t)s->scores_width);
}

// A damaged weight shows in the logits, as NaN or a number over 1e18, or in keys and values, which
// may not hold what it has become.
static void check_numbers(const Cache *kv, const float *logits, int n) {
    const Model *m = kv->m;
    int bad = kv->damaged;
    size_t all = (size_t)n * (size_t)m->c.vocab_size;
    for (size_t i = 0; i < all; i++) bad |= !(fabsf(logits[i]) < 1e18f);
    if (bad)
        die("%s: the model computes a number that is infinite, NaN or over 1e18; its file may be "
            "damaged: try -m check", m->path);
}

// ---- [2.6] checkpoints --------------------------------------------------------------------------
// load_model maps a file and notes where its matrices begin. Version 5 has a header, a directory
// that names the tensors, and the tensors, in the layout of [2.2]; llama2.c's versions 0 and 1 have
// float32 row by row, in a fixed order, which is packed into panels.

typedef struct Header {
    uint32_t magic;           // 0x616b3432, "ak42" as in llama2.c
    int32_t version;          // 5
    uint64_t tokenizer_hash;  // fingerprint of the tokenizer; 0: none
    uint64_t content_hash;    // of the whole file, with both hashes taken as zero
    uint64_t file_size;
    uint64_t header_hash;     // of header and directory, with both hashes taken as zero
    uint32_t n_tensors, zero;
    char name[64];
    Config c;
    uint8_t reserved[400 - sizeof(Config)];  // zero: room for what is added to Config's end
} Header;
_Static_assert(sizeof(Header) == 512, "a checkpoint's header has 512 bytes");
typedef struct {              // an entry of the directory
    char name[32];
    uint32_t dtype, rows, cols, layer;  // layer NO_LAYER: of none
    uint64_t offset, bytes;
} Entry;
enum { MAX_LAYERS = 256 };
static const uint32_t NO_LAYER = UINT32_MAX;

// What a tensor is: VECTOR has one row; MATRIX any dtype of a matrix; DATA any number of bytes.
enum { VECTOR = ROWS, MATRIX = F32, DATA = BYTES, NEEDED = 16 };
typedef struct {
    const char *name;
    size_t field;             // in Model or Layer
    int layers;               // 0: it is in Model
    int kind, rows, cols;
} TensorRule;
enum { LLAMA2C_TENSORS = 12, N_TENSORS = 38 };

// All tensors that there are; hidden: hidden_dim, or expert_hidden in a layer with experts. The
// first come in the order of llama2.c's version 0; the last is loaded first.
static void tensor_rules(const Config *c, int hidden, TensorRule rules[N_TENSORS]) {
    int dim = c->dim, hd = c->head_dim, vocab = c->vocab_size, n_experts = c->n_experts;
    int q_dim = c->n_heads * hd, kv_dim = c->n_kv_heads * hd;
    bool wide = c->flags & WIDE_NORMS;
#define IN(of, name) #name, offsetof(of, name), sizeof(of) == sizeof(Layer) ? c->n_layers : 0
    const TensorRule all[N_TENSORS] = {
        {IN(Model, token_embedding), MATRIX | NEEDED, vocab, dim},
        {IN(Layer, attn_norm), VECTOR, 1, dim}, {IN(Layer, wq), MATRIX | NEEDED, q_dim, dim},
        {IN(Layer, wk), MATRIX | NEEDED, kv_dim, dim},
        {IN(Layer, wv), MATRIX | NEEDED, kv_dim, dim},
        {IN(Layer, wo), MATRIX | NEEDED, dim, q_dim}, {IN(Layer, ffn_norm), VECTOR, 1, dim},
        {IN(Layer, w_gate), MATRIX | NEEDED, hidden, dim},
        {IN(Layer, w_down), MATRIX | NEEDED, dim, hidden}, {IN(Layer, w_up), MATRIX, hidden, dim},
        {IN(Model, final_norm), VECTOR | NEEDED, 1, dim},
        {IN(Model, classifier), MATRIX, vocab, dim},
        {IN(Model, rope_freqs), VECTOR | NEEDED, 1, hd / 2},
        {IN(Model, rope_freqs_local), VECTOR, 1, hd / 2},
        {IN(Layer, bq), VECTOR, 1, q_dim}, {IN(Layer, bk), VECTOR, 1, kv_dim},
        {IN(Layer, bv), VECTOR, 1, kv_dim}, {IN(Layer, bo), VECTOR, 1, dim},
        {IN(Layer, q_norm), VECTOR, 1, wide ? q_dim : hd},
        {IN(Layer, k_norm), VECTOR, 1, wide ? kv_dim : hd},
        {IN(Layer, post_attn_norm), VECTOR, 1, dim}, {IN(Layer, post_ffn_norm), VECTOR, 1, dim},
        {IN(Layer, attn_norm_bias), VECTOR, 1, dim}, {IN(Layer, ffn_norm_bias), VECTOR, 1, dim},
        {IN(Model, final_norm_bias), VECTOR, 1, dim},
        {IN(Model, position_embedding), MATRIX, c->seq_len, dim},
        {IN(Layer, b_gate), VECTOR, 1, hidden}, {IN(Layer, b_up), VECTOR, 1, hidden},
        {IN(Layer, b_down), VECTOR, 1, dim}, {IN(Layer, sinks), VECTOR, 1, c->n_heads},
        {IN(Layer, router_bias), VECTOR, 1, n_experts},
        {IN(Layer, choice_bias), VECTOR, 1, n_experts},
        {IN(Model, check_ids), DATA, 1, 0}, {IN(Model, check_cases), DATA, 1, 0},
        {IN(Model, check_norms), VECTOR, 1, c->n_layers + 1},
        {IN(Model, check_logits), VECTOR, 1, vocab}, {IN(Model, score), VECTOR, 1, dim},
        {IN(Layer, router), MATRIX, n_experts, dim},
    };
    memcpy(rules, all, sizeof all);
}
static Matrix *tensor_of(Model *m, const TensorRule *rule, int layer) {
    char *base = rule->layers ? (char *)&m->layers[layer] : (char *)m;
    return (Matrix *)(void *)(base + rule->field);
}

// Ends the program unless every size is in a range in which nothing below can overflow.
static void check_config(Model *m) {
    const Config *c = &m->c;
    int experts = c->n_experts;
    const struct { const char *name; int value, low, high; } limits[] = {
        {"dim", c->dim, 1, 1 << 20}, {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, MAX_LAYERS}, {"n_heads", c->n_heads, 1, 1 << 14},
        {"n_kv_heads", c->n_kv_heads, 1, 1 << 14}, {"vocab_size", c->vocab_size, 1, 1 << 24},
        {"seq_len", c->seq_len, 1, 1 << 24}, {"head_dim", c->head_dim, 2, 1 << 14},
        {"activation", c->activation, 0, N_ACTIVATIONS - 1},
        {"sliding_window", c->sliding_window, 0, 1 << 24},
        {"query_length", c->query_length, c->query_growth != 0, 1 << 24},
        {"n_experts", experts, 0, 1 << 10}, {"n_active", c->n_active, experts > 0, experts},
        {"n_shared", c->n_shared, 0, experts > 0 ? experts - c->n_active : 0},
        {"expert_hidden", c->expert_hidden, experts > 0, experts > 0 ? 1 << 20 : 0},
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value < limits[i].low || limits[i].value > limits[i].high) {
            if (!m->header) die("%s is not a model (export.py makes one), or damaged", m->path);
            die("%s: damaged: %s = %d in its header", m->path, limits[i].name, limits[i].value);
        }
    if (c->n_heads % c->n_kv_heads || c->head_dim % 2 || c->n_heads * c->head_dim > 1 << 20)
        die("%s: damaged: its header has %d query heads, %d key/value heads of size %d",
            m->path, c->n_heads, c->n_kv_heads, c->head_dim);
    m->layers = zeros((size_t)c->n_layers, sizeof *m->layers);
}

// The hash of the first bytes of a version 5 file, with both hashes in its header taken as zero.
static uint64_t file_hash(const Model *m, size_t bytes) {
    Header blank = *m->header;
    blank.content_hash = blank.header_hash = 0;
    return mix64(bytes) + hash_words(&blank, sizeof blank, 0) +
           hash_words(m->file + sizeof blank, bytes - sizeof blank, sizeof blank / 8);
}

// Puts a tensor where it belongs. Returns how many the directory has of it: 1, or 0. (Of those from
// w_gate to b_down each expert has one.)
static uint32_t load_tensor(Model *m, const TensorRule *rule, int l) {
    const Entry *e = (const Entry *)(const void *)(m->header + 1), *end = e + m->header->n_tensors;
    uint32_t layer = rule->layers ? (uint32_t)l : NO_LAYER, kind = (uint32_t)rule->kind % NEEDED;
    while (e < end && (e->layer != layer || strncmp(e->name, rule->name, sizeof e->name))) e++;
    if (e == end && rule->kind < NEEDED) return 0;
    bool right = e < end && (e->dtype == kind ||
                             (kind == MATRIX && e->dtype > F32 && e->dtype < BYTES));
    bool experts = rule->layers && rule->field >= offsetof(Layer, w_gate) &&
                   rule->field <= offsetof(Layer, b_down) && m->layers[l].router.data;
    int cols = right && kind == DATA && e->cols <= INT_MAX ? (int)e->cols : rule->cols;
    uint32_t count = experts ? (uint32_t)m->c.n_experts : 1;
    if (!right || e->rows != (uint32_t)rule->rows * count || e->cols != (uint32_t)cols ||
        e->offset % 64 || e->bytes != matrix_bytes((int)e->dtype, rule->rows, cols) * count ||
        e->offset > m->file_size || e->bytes > m->file_size - e->offset)
        die("%s: damaged: tensor %s (%d x %d) of layer %d is missing or wrong in its directory",
            m->path, rule->name, rule->rows, cols, l);
    *tensor_of(m, rule, l) = (Matrix){(int)e->dtype, rule->rows, cols, m->file + e->offset};
    return 1;
}

static void load_v5(Model *m) {
    TensorRule rules[2][N_TENSORS];  // of layers without and with experts
    uint32_t found = 0;
    const Header none = {0}, *h = m->header = (Header *)(uintptr_t)m->file;
    if (m->file_size < sizeof *h || m->file_size != h->file_size)
        die("%s is truncated or damaged: it has %zu bytes, not as many as its header says",
            m->path, m->file_size);
    size_t end = sizeof *h + h->n_tensors * sizeof(Entry);
    if (h->n_tensors > N_TENSORS * MAX_LAYERS || end > m->file_size ||
        file_hash(m, end) != h->header_hash)
        die("%s: damaged: its header does not have the hash that it states", m->path);
    if (h->zero || h->c.flags >= 2 * FULL_SHARES || h->name[sizeof h->name - 1] ||
        memcmp(h->reserved, none.reserved, sizeof h->reserved))
        die("%s needs a newer version of this program: its header has fields that this one does "
            "not know", m->path);
    m->c = h->c;
    check_config(m);
    for (int i = 0; i < 2; i++)
        tensor_rules(&m->c, i ? m->c.expert_hidden : m->c.hidden_dim, rules[i]);
    for (int i = N_TENSORS; i-- > 0;)
        for (int l = 0; l < rules[0][i].layers || !l; l++)
            found += load_tensor(m, &rules[m->layers[l].router.data != NULL][i], l);
    const Entry *e = (const Entry *)(const void *)(h + 1), *last = e + h->n_tensors;
    for (int i = 0; i < N_TENSORS && e < last; i++)
        if (!strncmp(rules[0][i].name, e->name, sizeof e->name)) e++, i = -1;
    if (found < h->n_tensors)
        die("%s needs a newer version of this program, or is damaged: it has a tensor \"%.32s\"",
            m->path, e < last ? e->name : "(one twice)");
    if (!m->rope_freqs_local.data) m->rope_freqs_local = m->rope_freqs;
}

// Packs a row of w[0], which lies row by row, into the panels of w[1].
static void pack_task(void *context, int row) {
    const Matrix *w = context;
    for (int c = 0; c < w->cols; c++) put_number(&w[1], row, c, weight(w, row, c), 1);
}

// Goes through the tensors of llama2.c's versions 0 and 1, float32 row by row without any names.
// Returns where they end, and of what is packed; if there is memory for that, puts them in place.
static size_t llama2c_tensors(Model *m, bool v1, bool tied, bool in_place, size_t *packed) {
    static const char order[LLAMA2C_TENSORS] = {1, 6, 10, 0, 2, 3, 4, 5, 7, 8, 9, 11};  // of 1
    TensorRule rules[N_TENSORS];
    size_t at = v1 ? 256 : 28, to = (size_t)m->c.head_dim * 4;  // behind the header, frequencies
    tensor_rules(&m->c, m->c.hidden_dim, rules);
    for (int i = 0; i < LLAMA2C_TENSORS - tied; i++) {
        const TensorRule *rule = &rules[v1 ? order[i] : i];
        bool packs = rule->kind % NEEDED == MATRIX && !in_place;
        for (int l = 0; l < rule->layers || !l; l++) {
            Matrix w[] = {{ROWS, rule->rows, rule->cols, m->file},
                          {F32, rule->rows, rule->cols, m->packed}};
            if (m->packed) {
                w[0].data += at, w[1].data += to;
                if (packs) parallel(pack_task, w, rule->rows);
                *tensor_of(m, rule, l) = w[packs];
            }
            at += matrix_bytes(ROWS, rule->rows, rule->cols);
            if (packs) to += matrix_bytes(F32, rule->rows, rule->cols);
        }
        if (!v1 && i == LLAMA2C_TENSORS - 2)  // tables for RoPE, which are not used
            at += (size_t)m->c.seq_len * (size_t)m->c.head_dim * 4;
    }
    *packed = to;
    return at;
}

// Version 0 has a header of 7 numbers (negative vocab_size: untied). Files over 1 GiB are used as
// they are.
static void load_llama2c(Model *m, bool v1) {
    Config *c = &m->c;
    *c = (Config){.norm_eps = 1e-5f, .embed_scale = 1};
    memcpy(c, m->file + (v1 ? 8 : 0), 28);  // dim to seq_len
    bool tied = v1 ? m->file[36] != 0 : c->vocab_size > 0, in_place = m->file_size > 1u << 30;
    if (!v1 && !tied) c->vocab_size = (int32_t)-(uint32_t)c->vocab_size;
    c->head_dim = c->n_heads > 0 && c->dim % c->n_heads == 0 ? c->dim / c->n_heads : 0;
    c->attn_scale = 1.0f / sqrtf((float)c->head_dim);
    check_config(m);
    size_t packed, end = llama2c_tensors(m, v1, tied, in_place, &packed);
    if (m->file_size != end)
        die("%s is %s: its header asks for %zu bytes, it has %zu", m->path,
            m->file_size < end ? "truncated, or not a checkpoint" : "too long", end, m->file_size);
    if (in_place) fprintf(stderr, "run: %s is read row by row; export.py makes it fast\n", m->path);
    m->packed = zeros(packed, 1);
    llama2c_tensors(m, v1, tied, in_place, &packed);
    float *freqs = (float *)(void *)m->packed;
    for (int i = 0, half = c->head_dim / 2; i < half; i++)
        freqs[i] = (float)exp_double(-9.21034037197618274 * i / half);  // 10000^(-i/half)
    m->rope_freqs = m->rope_freqs_local = (Matrix){ROWS, 1, c->head_dim / 2, m->packed};
}

// Opens a checkpoint of any version, told apart by its first bytes. Errors end the program. (Behind
// a file's end its last page is zeros: a header can be looked at before the size is checked.)
static void load_model(Model *m, const char *path) {
    *m = (Model){.path = path};
    m->file = map_weights(path, &m->file_size);
    uint32_t magic = read_u32(m->file), version = read_u32(m->file + 4);
    bool gguf = magic == 0x46554747, versioned = magic == 0x616b3432;
    if (gguf || (versioned && version != 1 && version != 5))
        die("%s is a %s of version %u, this program reads checkpoints of 0, 1 and 5: make one with "
            "`.venv/bin/python export.py SOURCE model.bin`", path,
            gguf ? "GGUF file" : "checkpoint", version);
    if (versioned && version == 5) load_v5(m);
    else load_llama2c(m, versioned);
    if (!m->classifier.data) m->classifier = m->token_embedding;
}

static uint64_t model_hash(const Model *m) {
    return m->header ? m->header->content_hash : hash64(m->file, m->file_size);
}
static uint64_t tokenizer_hash_of(const Model *m) {
    return m->header ? m->header->tokenizer_hash : 0;
}
static void free_model(Model *m) {
    munmap((void *)(uintptr_t)m->file, m->file_size);
    free(m->packed);
    free(m->layers);
    *m = (Model){0};
}

// ---- [2.7] experts ------------------------------------------------------------------------------
// The tokens of a batch are sorted by the experts that they visit, so that an expert's matrices are
// read once for all its guests, and all products are dealt out together. An expert's rows of guests
// begin at a multiple of TILE.

// Scores, and what each expert counts for a token: 0 if it is not visited. A bias for the choice
// alone can have kept all of them busy in training. Those that are shared, the last ones, are
// visited by all and count by a sigmoid of their own.
static void route(const Pass *f, int i) {
    const Config *c = &f->m->c;
    const Matrix *bias = &f->l->choice_bias;
    int n = c->n_experts - c->n_shared;
    float sum = 0, *score = row_of(f->s->at->route, i, c->n_experts);
    float *share = row_of(f->s->at->share, i, c->n_experts);
    add_bias(score, &f->l->router_bias);
    for (int e = c->flags & SIGMOID_ROUTER ? 0 : n; e < c->n_experts; e++)
        score[e] = 1.0f / (1.0f + exp_(-score[e]));
    if (!(c->flags & SIGMOID_ROUTER)) softmax(score, n);
    for (int e = 0; e < c->n_experts; e++) share[e] = e < n ? 0 : score[e];
    for (int chosen = 0; chosen < c->n_active; chosen++) {
        float most = -INFINITY;
        int best = 0;
        for (int e = 0; e < n; e++) {
            float fit = score[e] + (bias->data ? vec(bias)[e] : 0);
            if (share[e] == 0 && fit > most) best = e, most = fit;
        }
        share[best] = fmaxf(score[best], 1e-30f);
        sum += share[best];
    }
    for (int e = 0; e < n && c->flags & FULL_SHARES; e++) share[e] /= sum;
}
static Matrix expert_matrix(const Matrix *w, int expert) {
    size_t bytes = w->data && expert ? matrix_bytes(w->dtype, w->rows, w->cols) : 0;
    return (Matrix){w->dtype, w->rows, w->cols, w->data + bytes * (size_t)expert};
}
static void arrive(const Pass *f, int row) {
    int dim = f->m->c.dim, token = f->s->at->guest[row].token;
    if (token >= 0)
        memcpy(row_of(f->s->at->rows, row, dim), row_of(f->s->xb, token, dim), (size_t)dim * 4);
}
static void activate_guest(const Pass *f, int row) {
    const Layer *l = f->l;
    int n = l->w_gate.rows, expert = f->s->at->guest[row].expert;
    float *gate = row_of(f->s->gate, row, n), *up = l->w_up.data ? row_of(f->s->up, row, n) : NULL;
    float limit = f->m->c.act_limit;
    if (f->s->at->guest[row].token < 0) return;
    Matrix b_gate = expert_matrix(&l->b_gate, expert), b_up = expert_matrix(&l->b_up, expert);
    add_bias(gate, &b_gate), add_bias(up, &b_up);
    for (int i = 0; i < n && limit > 0 && up; i++) {
        gate[i] = fminf(gate[i], limit);
        up[i] = fmaxf(fminf(up[i], limit), -limit) + 1.0f;
    }
    gated_activation(gate, up, n, f->m->c.activation);
}
// A token adds up its answers, always in the order of the experts.
static void leave(const Pass *f, int i) {
    int dim = f->m->c.dim, n_experts = f->m->c.n_experts, row = 0;
    float *xb = row_of(f->s->xb, i, dim), *share = row_of(f->s->at->share, i, n_experts);
    memset(xb, 0, (size_t)dim * sizeof(float));
    for (int e = 0; e < n_experts; e++) {
        if (!(share[e] > 0)) continue;
        while (f->s->at->guest[row].token != i || f->s->at->guest[row].expert != e) row++;
        float *answer = row_of(f->s->at->rows, row, dim);
        Matrix bias = expert_matrix(&f->l->b_down, e);
        add_bias(answer, &bias);
        for (int j = 0; j < dim; j++) xb[j] += share[e] * answer[j];
    }
}
static void experts(const Pass *f) {
    const Layer *l = f->l;
    State *s = f->s;
    int n_experts = f->m->c.n_experts, rows = 0, n = 0, n_down = 0;
    Guest *guest = s->at->guest;
    Product *visits = s->at->visits, *down = visits + 2 * n_experts;
    products(f, "router", s->xb, &(Product){.w = l->router, .y = s->at->route}, 1);
    each(f, "route", f->n, route);
    for (int e = 0; e < n_experts; e++) {
        int first = rows;
        for (int i = 0; i < f->n; i++)
            if (row_of(s->at->share, i, n_experts)[e] > 0) guest[rows++] = (Guest){i, e};
        if (rows == first) continue;
        visits[n++] = (Product){expert_matrix(&l->w_gate, e), s->gate, first, rows - first};
        visits[n] = (Product){expert_matrix(&l->w_up, e), s->up, first, rows - first};
        n += l->w_up.data != NULL;
        down[n_down++] = (Product){expert_matrix(&l->w_down, e), s->at->rows, first, rows - first};
        while (rows % TILE) guest[rows++] = (Guest){-1, e};
    }
    each(f, "arrive", rows, arrive);
    products(f, "w_gate w_up", s->at->rows, visits, n);
    each(f, "activate", rows, activate_guest);
    products(f, "w_down", s->gate, down, n_down);
    each(f, "leave", f->n, leave);
}

// =================================================================================================
// [3] The tokenizer: text <-> tokens
// =================================================================================================
//
// Tokens are the pieces of text that a model reads and writes. A text goes through the steps that
// its file lists: each changes it (unicode's normal form C, a space in front, one string for
// another) or cuts it (at added tokens such as <|im_end|>, or as a regular expression does). Byte
// pair encoding turns what comes out of the last step into tokens: it starts with single bytes or
// characters and joins neighbours, the best pair first, until no pair is left. The best is the
// first in a list of pairs (GPT-2, Llama 3, Qwen) or makes the token of the highest score
// (SentencePiece). That is what the tokenizers library of Hugging Face does, in its order.

enum { NORMAL, CONTROL, USER_DEFINED, BYTE, UNUSED };  // types of a token
enum { ADD_BOS = 1, DROP_SPACE = 2, IGNORE_MERGES = 4, BY_SCORE = 8, CHARACTERS = 16, FUSE_UNK = 32,
       BARE = 64 };  // of a tokenizer; the last, in no file: steps change nothing
enum { LSTRIP = 1, RSTRIP = 2, SINGLE_WORD = 4, NORMALIZED = 8, ONLY_UNTYPED = 16 };  // of Added
enum { FIND, NORMAL_FORM_C, REPLACE, SPLIT };  // steps
enum { TAKE, TAKE_ALL, FOLLOWED, NOT_FOLLOWED };  // elements of a pattern
// The pieces of a chat, in prompt_turn's words, and their flags. The first say what is left out of
// the text behind a piece: blanks at its ends; newlines at its beginning; all up to </think>, and
// then, FROM_THOUGHT bits further up, blanks of what follows.
enum { DEFAULT_SYSTEM, SYSTEM_BEFORE, SYSTEM_AFTER, USER_BEFORE, USER_BEFORE_SYSTEM, LATER_BEFORE,
       USER_AFTER, REPLY_BEFORE, ASSISTANT_AFTER, N_CHAT,
       FILL = N_CHAT, N_PIECES };  // what a text to be filled in looks like: see input_open
enum { TRIM_LEFT = 1, TRIM_RIGHT = 2, TRIM_NEWLINES = 4, CUT_THOUGHT = 8, FROM_THOUGHT = 4,
       DATE = 128, HAS_SYSTEM = 256,  // it is a format of strftime; a system text has a place,
       EMPTY_IS_NONE = 512, SYSTEM_LAST = 1024,  // but not an empty one; it is in the last turn
       THOUGHTS = 2048, CHAT_FLAGS = 4095 };     // answers have thoughts: see output_think
// A character is a code point, or N_CHARS + a byte that is not part of valid UTF-8; a flag marks
// what was typed.
enum { N_CHARS = 0x110000, TYPED = 1 << 22, CODE = TYPED - 1 };

typedef struct { const char *s; size_t len; } Text;
typedef struct { Text text; float score; int type; } Token;
typedef struct {
    uint32_t magic, version;  // 0x346b6f74 "tok4", 1
    uint64_t hash;            // fingerprint: hash64 of all that follows
    int32_t vocab_size, bos, eos, unk;  // -1: none
    uint32_t flags, n_merges, n_added, n_ranges, n_elements, n_steps, n_marks, n_forms, n_stops;
    uint32_t n_chat;
    float temperature, top_p;  // the model's own defaults, for a chat; -1: none
    int32_t top_k;             // 0: none
    float min_p, repeat_penalty;  // 0: none
    uint32_t zero;
    uint64_t white, word;      // sets of atoms: what LSTRIP takes, what SINGLE_WORD must not touch
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 112, "the tokenizer's header has 112 bytes");

// Characters that no pattern tells apart share an atom; bit a of a set: atom a is in it. A pattern
// is a graph of elements. TAKE takes least to most characters of a set, as many as it can so that
// what follows (`next`; 0: nothing, the match ends) fits as well, TAKE_ALL all in any case;
// FOLLOWED and NOT_FOLLOWED look at one. What does not fit is tried again from `otherwise` on
// (0: in vain).
typedef struct {
    uint64_t set;
    uint32_t least, most;
    uint16_t next, otherwise, kind, zero;
} Element;
// FIND cuts at the added tokens, `how` 1 at the NORMALIZED ones. REPLACE writes `to` for each
// `from`; an empty one is in front, `how` 1: unless it is there already, 2: only of a whole text.
// SPLIT cuts at the matches of the pattern that begins with an element. Bits of `how`: 0 to 3, cut
// where two stretches without, without and with, with and without, with a match meet; 4, 5: drop
// what is none, or one.
typedef struct { uint8_t kind, how, n_from, n_to; uint32_t element; char from[12], to[12]; } Step;
typedef struct { uint32_t first, last, value; } Range;     // of characters
typedef struct { uint32_t whole, first, second; } Form;  // second 0: none; bit 31: never joined

// A hash table of numbers (open addressing); an empty entry has number -1.
typedef struct { uint64_t key; int number; } Keyed;
typedef struct { Keyed *entries; size_t mask, n; } Index;
typedef struct { int *ids; size_t n, capacity; } Ids;  // tokens, or characters

typedef struct {
    TokenizerHeader h;
    bool llama2c;             // read from llama2.c's layout
    char path[PATH_MAX + 20];
    const uint8_t *file;
    size_t file_size;
    Token *tokens;            // (vocab_size)
    Index index;              // all that is looked up: see OF_TEXT
    int *joined;              // (n_merges) what a pair becomes
    uint8_t *atoms, *marks;   // of the characters; their canonical combining classes
    const Element *elements;
    const Step *steps;
    Form *forms;              // canonical decompositions into one or two characters
    const int32_t *stops;     // (n_stops) tokens that end an answer
    Text chat[N_PIECES];
    uint32_t chat_flags[N_PIECES];
} Tokenizer;

static void push(Ids *ids, int id) {
    if (ids->n == ids->capacity) {
        ids->capacity = ids->capacity ? ids->capacity * 2 : 64;
        ids->ids = resize(ids->ids, ids->capacity, sizeof(int));
    }
    ids->ids[ids->n++] = id;
}

// ---- [3.1] looking things up --------------------------------------------------------------------
// What has a number: the text of a token that byte pair encoding may give; two tokens that can be
// joined (their rank); forms, by their whole and by their parts. Added tokens are a tree. A node
// (the roots are 0 and, for those that are NORMALIZED, 1) has others behind it, one for each
// character, and a token may end there: 32 times its id, plus its flags.
enum { OF_TEXT, OF_MERGE, OF_WHOLE, OF_PARTS, OF_NODE, OF_END };
static uint64_t key_of(int kind, int a, int b) {
    return (uint64_t)kind << 60 | (uint64_t)a << 30 | (uint64_t)b;
}
static uint64_t key_of_text(const char *s, size_t len) { return hash64(s, len) >> 4; }

// No file can know which keys come to one place: that depends on where the table is.
static Keyed *index_entry(const Index *x, uint64_t key) {
    for (size_t i = (size_t)mix64(key + (uintptr_t)x->entries);; i++) {
        Keyed *e = &x->entries[i & x->mask];
        if (e->number < 0 || e->key == key) return e;
    }
}
static int index_find(const Tokenizer *t, uint64_t k) { return index_entry(&t->index, k)->number; }
static void index_grow(Index *x, size_t size) {
    Index old = *x;
    x->mask = size - 1;
    x->entries = memset(zeros(size, sizeof(Keyed)), -1, size * sizeof(Keyed));
    for (size_t i = 0; old.n && i <= old.mask; i++)
        if (old.entries[i].number >= 0) *index_entry(x, old.entries[i].key) = old.entries[i];
    free(old.entries);
}
// Returns the number that a key has: this one, if there was none.
static int index_add(Tokenizer *t, uint64_t key, int number) {
    Index *x = &t->index;
    if (2 * x->n >= x->mask) index_grow(x, 2 * x->mask + 2);
    Keyed *e = index_entry(x, key);
    if (e->number < 0) *e = (Keyed){key, number}, x->n++;
    return e->number;
}
// The token with this text that byte pair encoding may give, or -1.
static int token_of(const Tokenizer *t, const char *s, size_t len) {
    int id = index_find(t, key_of_text(s, len));
    bool right = id >= 0 && t->tokens[id].text.len == len && !memcmp(t->tokens[id].text.s, s, len);
    return right ? id : -1;
}

// Decodes one character of UTF-8; a byte that is not part of a valid one counts as U+FFFD.
static uint32_t next_char(const char *s, size_t len, size_t *used) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    const uint8_t *p = (const uint8_t *)s;
    size_t more = (size_t)((p[0] >= 0xc2) + (p[0] >= 0xe0) + (p[0] >= 0xf0)), n = 1;  // to follow
    uint32_t c = more ? p[0] & (0x3fu >> more) : p[0];
    for (; n <= more && n < len && (p[n] & 0xc0) == 0x80; n++) c = c << 6 | (p[n] & 0x3f);
    bool valid = n > more && p[0] < (more ? 0xf5 : 0x80) && c >= least[more] && c < N_CHARS &&
                 (c < 0xd800 || c > 0xdfff);
    *used = valid ? n : 1;
    return valid ? c : 0xfffd;
}
// Appends the characters of a text, of which some bytes can be marked as typed.
static void push_text(Ids *out, Text text, const char *typed) {
    for (size_t i = 0, used; i < text.len; i += used) {
        int c = (int)next_char(text.s + i, text.len - i, &used);
        if (c == 0xfffd && used == 1) c = N_CHARS + (uint8_t)text.s[i];
        push(out, typed && memchr(typed + i, 1, used) ? c | TYPED : c);
    }
}
// Writes a character. Returns its number of bytes.
static size_t put_char(char *s, int c) {
    c &= CODE;
    int more = c < N_CHARS ? (c >= 0x80) + (c >= 0x800) + (c >= 0x10000) : 0;
    s[0] = (char)(more ? 256 - (128 >> more) + (c >> 6 * more) : c);
    for (int i = 1; i <= more; i++) s[i] = (char)(0x80 | (c >> 6 * (more - i) & 0x3f));
    return (size_t)more + 1;
}

// ---- [3.2] opening ------------------------------------------------------------------------------
// This program's layout: header, tokens {float score; uint8 type, 0; uint16 length; bytes}, added
// tokens {uint32 id; uint8 flags, 0; uint16 length; bytes, as they are looked for}, zeros up to a
// multiple of 8, elements, steps, merges (pairs of tokens, the best first), ranges of atoms, ranges
// of combining classes, forms (none refers to a later one), stop tokens, chat pieces {uint32
// length, flags; bytes}. llama2.c's: uint32, tokens {float score; uint32 length; bytes}.

// The next n bytes of what is left of a file, or NULL, once and for all, if it is shorter.
typedef struct { const uint8_t *p, *end; } Bytes;
static const void *bytes_take(Bytes *b, uint64_t n) {
    const uint8_t *taken = b->p && n <= (uint64_t)(b->end - b->p) ? b->p : NULL;
    b->p = taken ? taken + n : NULL;
    return taken;
}

// The next record {4 bytes; type or flags, 0, uint16 length; bytes}, or {4 bytes; uint32 length;
// bytes} in llama2.c's layout, and its text; NULL: it is damaged, or is not there.
static const uint8_t *record_take(const Tokenizer *t, Bytes *b, Text *text) {
    const uint8_t *start = bytes_take(b, 8);
    text->len = start ? read_u32(start + 4) >> (t->llama2c ? 0 : 16) : 0;
    text->s = bytes_take(b, text->len);
    return start && text->s && (t->llama2c || !start[5]) ? start : NULL;
}

// Reads the tokens, and notes where text becomes them. llama2.c's layout has no types: the first
// three are <unk>, BOS and EOS, which are found in no text, the 256 after them bytes, as <0xHH>.
// False: some are missing.
static bool read_tokens(Tokenizer *t, Bytes *file) {
    static char bytes[256];
    t->tokens = zeros((size_t)t->h.vocab_size, sizeof *t->tokens);
    index_grow(&t->index, 1 << 16);
    for (int id = 0; id < t->h.vocab_size; id++) {
        Text text;
        const uint8_t *start = record_take(t, file, &text);
        int type = !start ? UNUSED + 1 : !t->llama2c ? start[4] : id < 3 ? CONTROL : NORMAL;
        if (type > UNUSED) return false;
        if (t->llama2c && id >= 3 && id < 259 && text.len == 6 && !memcmp(text.s, "<0x", 3)) {
            type = BYTE;
            bytes[id - 3] = (char)(id - 3);
            text = (Text){&bytes[id - 3], 1};
        }
        t->tokens[id] = (Token){text, float_of(read_u32(start)), type};
        if (type != NORMAL) continue;
        Text first = t->tokens[index_add(t, key_of_text(text.s, text.len), id)].text;  // of equals
        if (first.len != text.len || memcmp(first.s, text.s, text.len)) return false;
    }
    for (int id = 0; id < t->h.vocab_size; id++)  // bytes that are no other token
        if (t->tokens[id].type == BYTE)
            index_add(t, key_of_text(t->tokens[id].text.s, t->tokens[id].text.len), id);
    return true;
}

enum { LONGEST_ADDED = 1024 };  // so many steps can be tried in vain at each place of a text
static bool read_added(Tokenizer *t, Bytes *file) {
    int n_nodes = 2;
    for (uint32_t i = 0; i < t->h.n_added; i++) {
        Text text;
        Ids chars = {0};
        const uint8_t *start = record_take(t, file, &text);
        uint32_t id = start ? read_u32(start) : UINT32_MAX;
        if (id >= (uint32_t)t->h.vocab_size || start[4] > 31) return false;
        if (!text.len || text.len > LONGEST_ADDED) return false;
        int node = (start[4] & NORMALIZED) != 0;
        push_text(&chars, text, NULL);
        for (size_t j = 0; j < chars.n; j++) {
            node = index_add(t, key_of(OF_NODE, node, chars.ids[j]), n_nodes);
            n_nodes += node == n_nodes;
        }
        index_add(t, key_of(OF_END, node, 0), (int)(id << 5 | start[4]));
        free(chars.ids);
    }
    return true;
}

// Notes the ranks of merges, and what they make: what byte pair encoding may not give is not made.
static bool read_merges(Tokenizer *t, const uint32_t *pair) {
    static char both[1 << 17];
    uint32_t n = (uint32_t)t->h.vocab_size;
    if (t->h.n_merges > 1 << 24) return false;  // a float holds no greater rank
    t->joined = zeros(t->h.n_merges, sizeof *t->joined);
    for (uint32_t rank = 0; rank < t->h.n_merges; rank++, pair += 2) {
        if (pair[0] >= n || pair[1] >= n) return false;
        Text a = t->tokens[pair[0]].text, b = t->tokens[pair[1]].text;
        memcpy(both, a.s, a.len), memcpy(both + a.len, b.s, b.len);
        t->joined[rank] = token_of(t, both, a.len + b.len);
        if (t->joined[rank] >= 0)
            index_add(t, key_of(OF_MERGE, (int)pair[0], (int)pair[1]), (int)rank);
    }
    return true;
}

// A table of a number for each character, from ranges; NULL: they are damaged.
static uint8_t *read_ranges(const Range *range, uint32_t n, uint32_t limit) {
    uint8_t *table = zeros(N_CHARS + 256, 1);
    for (; n && range->first <= range->last && range->last < N_CHARS && range->value < limit;
         n--, range++)
        memset(table + range->first, (int)range->value, range->last + 1 - range->first);
    memset(table + N_CHARS, table[0xfffd], 256);
    if (n) free(table);
    return n ? NULL : table;
}

// Normal form C (Unicode Standard Annex 15). Hangul syllables are made of three parts by rule.
static bool read_forms(Tokenizer *t, const Form *forms) {
    enum { SYLLABLE = 0xac00, LEAD = 0x1100, VOWEL = 0x1161, TAIL = 0x11a7, N = 11172 };
    uint32_t n = t->h.n_forms;
    t->forms = zeros(n + N, sizeof *t->forms);
    for (uint32_t i = 0; n && i < n + N; i++) {
        Form *f = &t->forms[i];
        uint32_t s = i - n, tail = s % 28;
        if (i < n) *f = forms[i];
        else if (tail) *f = (Form){SYLLABLE + s, SYLLABLE + s - tail, TAIL + tail};
        else *f = (Form){SYLLABLE + s, LEAD + s / (21 * 28), VOWEL + s / 28 % 21};
        if (f->whole >= N_CHARS || f->first >= N_CHARS || (f->second & INT32_MAX) >= N_CHARS)
            return false;
        index_add(t, key_of(OF_WHOLE, (int)f->whole, 0), (int)i);
        if (f->second <= INT32_MAX)
            index_add(t, key_of(OF_PARTS, (int)f->first, (int)f->second), (int)i);
    }
    return true;
}

static bool steps_are_right(const Tokenizer *t) {
    if (t->h.n_elements > 4096 || t->h.n_steps > 64 || t->h.n_forms > 4096)
        return false;  // calls are nested so deep
    for (uint32_t i = 0; i < t->h.n_elements; i++) {
        const Element *x = &t->elements[i];
        if (x->next - 1u < i || x->next >= t->h.n_elements || x->otherwise - 1u < i ||
            x->otherwise >= t->h.n_elements || x->least > x->most || x->kind > NOT_FOLLOWED ||
            x->zero) return false;
    }
    for (uint32_t i = 0; i < t->h.n_steps; i++) {
        const Step *s = &t->steps[i];
        if (s->kind > SPLIT || s->n_from > 12 || s->n_to > 12 || s->how > (s->kind == FIND ? 1 : 63)
            || (s->kind == SPLIT ? s->element >= t->h.n_elements : s->element)) return false;
    }
    return true;
}

// Reads what follows the tokens: nothing in llama2.c's layout, whose header counts none of it.
static bool read_tables(Tokenizer *t, Bytes *file) {
    const TokenizerHeader *h = &t->h;
    if (!t->llama2c) bytes_take(file, -(uint64_t)(file->p - t->file) & 7);
    t->elements = bytes_take(file, h->n_elements * (uint64_t)sizeof *t->elements);
    static const Step space = {.kind = REPLACE, .n_to = 1, .to = " "};
    t->steps = t->llama2c ? &space : bytes_take(file, h->n_steps * (uint64_t)sizeof *t->steps);
    const uint32_t *pairs = bytes_take(file, h->n_merges * 8ull);
    const Range *atoms = bytes_take(file, h->n_ranges * (uint64_t)sizeof *atoms);
    const Range *marks = bytes_take(file, h->n_marks * (uint64_t)sizeof *marks);
    const Form *forms = bytes_take(file, h->n_forms * (uint64_t)sizeof *forms);
    t->stops = bytes_take(file, h->n_stops * 4ull);
    for (uint32_t i = 0; i < h->n_chat; i++) {
        const uint8_t *head = bytes_take(file, 8);
        t->chat[i].len = head ? read_u32(head) : 0;
        t->chat[i].s = bytes_take(file, t->chat[i].len);
        t->chat_flags[i] = head ? read_u32(head + 4) : 0;
        bool date = t->chat_flags[i] & DATE && t->chat[i].s;  // ends in a zero byte
        if (t->chat_flags[i] > CHAT_FLAGS || (date && *(file->p - 1))) return false;
    }
    if (file->p != file->end || !steps_are_right(t) || !read_merges(t, pairs)) return false;
    t->atoms = read_ranges(atoms, h->n_ranges, 63);
    t->marks = read_ranges(marks, h->n_marks, 255);
    return t->atoms && t->marks && read_forms(t, forms);
}

static void free_tokenizer(Tokenizer *t) {
    void *tables[] = {t->tokens, t->index.entries, t->joined, t->atoms, t->marks, t->forms};
    if (t->file) munmap((void *)(uintptr_t)t->file, t->file_size);
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) free(tables[i]);
    *t = (Tokenizer){0};
}

// Opens a tokenizer for a model. Returns NULL, or what is wrong with it. llama2.c's layout has no
// header: this is what its program takes for granted, which ends texts at BOS.
static const char *load_tokenizer(Tokenizer *t, const char *path, const Model *m) {
    *t = (Tokenizer){.h = {.version = 1, .vocab_size = m->c.vocab_size, .bos = 1, .eos = 1,
                           .unk = 0, .flags = ADD_BOS | DROP_SPACE | BY_SCORE | CHARACTERS,
                           .n_steps = 1, .temperature = -1, .top_p = -1}};
    TokenizerHeader *h = &t->h;
    t->file = map_file(path, &t->file_size);
    snprintf(t->path, sizeof t->path, "%s", path);
    t->llama2c = t->file_size < 4 || memcmp(t->file, "tok", 3);
    Bytes file = {t->file, t->file + t->file_size};
    if (!t->llama2c && t->file[3] != '4')
        return "has another version's layout: export.py makes it anew";
    const void *start = bytes_take(&file, t->llama2c ? 4 : sizeof *h);
    if (start && !t->llama2c) memcpy(h, start, sizeof *h);
    if (h->version != 1) return "has an unknown version";
    if (tokenizer_hash_of(m) && tokenizer_hash_of(m) != h->hash) return "is not this model's";
    uint32_t n = (uint32_t)h->vocab_size;
    bool right = start && (t->llama2c || h->hash == hash64(t->file + 16, t->file_size - 16));
    if (!right || !n || n > (uint32_t)m->c.vocab_size || h->bos + 1u > n || h->eos + 1u > n ||
        h->unk + 1u > n || h->flags >= BARE || h->zero || h->n_chat > N_PIECES ||
        !(h->temperature <= 1e9f) || !(h->min_p <= 1) ||
        !(h->repeat_penalty <= 0 || (h->repeat_penalty >= 1e-3f && h->repeat_penalty <= 1e3f)) ||
        !read_tokens(t, &file) || !read_added(t, &file) || !read_tables(t, &file))
        return "is damaged, or not this model's tokenizer";
    return NULL;
}

// Finds the model's tokenizer: the named one, or model.tok or tokenizer.bin beside the model, or
// tokenizer.bin in the current folder; the first that fits.
static void find_tokenizer(Tokenizer *t, const char *named, const Model *m) {
    const char *slash = strrchr(m->path, '/'), *name = slash ? slash + 1 : m->path;
    const char *dot = strrchr(name, '.');  // of the model's path, before each name, are kept:
    int kept[] = {dot ? (int)(dot - m->path) : INT_MAX, (int)(name - m->path), 0};
    char path[PATH_MAX + 20], why[2 * PATH_MAX] = "there is no .tok file or tokenizer.bin";
    for (int i = 0; i < (named ? 1 : 3); i++) {
        snprintf(path, sizeof path, "%.*s%s", kept[i], m->path, i ? "tokenizer.bin" : ".tok");
        if (!named && access(path, F_OK)) continue;
        const char *wrong = load_tokenizer(t, named ? named : path, m);
        if (!wrong) return;
        snprintf(why, sizeof why, "%s %s", t->path, wrong);
        free_tokenizer(t);
    }
    die("no tokenizer for %s: %s; name one with -z", m->path, why);
}

// ---- [3.3] encoding, decoding -------------------------------------------------------------------
// A word is covered by symbols, in a ring with one of length 0 that is its beginning and its end.
// The two that are joined next, those of the highest priority, of equals the leftmost, are found by
// a tournament.

typedef struct { int id, at, len, next, prev, joined; } Symbol;  // len 0: joined to another
typedef struct {
    const Tokenizer *t;
    Ids *out;
    char *word;
    Symbol *symbols;  // (n), and the one between the last and the first
    int n, leaves;    // the least power of two that is above n
    size_t word_room, room;  // for bytes of a word; for leaves
    float *winners;   // (2 leaves) [leaves + i]: the priority of joining symbol i to the next one,
                      // -INFINITY: none; [i]: the higher one of [2 i] and [2 i + 1]
    bool text_start;
    uint64_t budget;  // of tries to match a pattern, against patterns that take for ever
} Encoder;

// Characters of a text; first: it begins where the whole text does.
typedef struct { const int *chars; size_t n; bool first; } Piece;
static void encode_piece(Encoder *e, Piece p, uint32_t step);
// Takes a part of a piece through a step.
static void encode_part(Encoder *e, Piece p, size_t from, size_t to, uint32_t step) {
    encode_piece(e, (Piece){p.chars + from, to - from, p.first && !from}, step);
}

// Finds out whether a symbol can be joined to the one behind it, and what it becomes.
static void encode_pair(Encoder *e, int i) {
    const Tokenizer *t = e->t;
    Symbol *a = &e->symbols[i], *b = &e->symbols[a->next];
    float priority = -INFINITY, *w = e->winners;
    if (a->len && b->len && t->h.flags & BY_SCORE) {
        a->joined = token_of(t, e->word + a->at, (size_t)(a->len + b->len));
        if (a->joined >= 0) priority = t->tokens[a->joined].score;
    } else if (a->len && b->len) {
        int rank = index_find(t, key_of(OF_MERGE, a->id, b->id));
        if (rank >= 0) a->joined = t->joined[rank], priority = (float)-rank;
    }
    w[i += e->leaves] = priority;
    while (i /= 2) w[i] = w[2 * i] > w[2 * i + 1] ? w[2 * i] : w[2 * i + 1];  // NOLINT: all set
}

// Whether each byte of a character is a token.
static bool has_bytes(const Tokenizer *t, const char *s, int len) {
    while (len && token_of(t, s + len - 1, 1) >= 0) len--;
    return !len;
}

// Covers a word with symbols: its bytes or characters, or one symbol if merges are ignored for it.
// Those that are no tokens can be joined to others if tokens have scores; if nothing can become of
// one it is left out.
static void encode_symbols(Encoder *e, Text word) {
    const Tokenizer *t = e->t;
    Symbol *s = e->symbols;
    int n = 0;
    bool whole = t->h.flags & IGNORE_MERGES && token_of(t, word.s, word.len) >= 0;
    for (size_t i = 0, len = whole ? word.len : 1; i < word.len; i += len) {
        if (t->h.flags & CHARACTERS && !whole) next_char(word.s + i, word.len - i, &len);
        int id = token_of(t, word.s + i, len);
        if (id >= 0 || t->h.unk >= 0 || t->h.flags & BY_SCORE ||
            has_bytes(t, word.s + i, (int)len))
            s[n] = (Symbol){id, (int)i, (int)len, n + 1, n - 1, -1}, n++;
    }
    s[n] = (Symbol){.prev = n - 1};
    s[0].prev = e->n = n;
    for (e->leaves = 1; e->leaves <= n;) e->leaves *= 2;
    for (int i = 0; i < 2 * e->leaves; i++) e->winners[i] = -INFINITY;
    for (int i = 0; i < n; i++) encode_pair(e, i);
}

// Appends the tokens of symbols. What is no token becomes the tokens of its bytes, or the unknown
// one, which comes before the next token.
static void encode_end(Encoder *e) {
    const Tokenizer *t = e->t;
    bool unknown = false, fuse = t->h.flags & FUSE_UNK;
    for (const Symbol *a = &e->symbols[e->n]; a->next != e->n;) {
        a = &e->symbols[a->next];
        const char *s = e->word + a->at;
        bool bytes = a->id < 0 && has_bytes(t, s, a->len);
        if (unknown && (a->id >= 0 || !(bytes || fuse))) push(e->out, t->h.unk), unknown = false;
        if (a->id >= 0) push(e->out, a->id);
        else if (!bytes) unknown = t->h.unk >= 0;
        for (int i = 0; i < a->len && bytes; i++) push(e->out, token_of(t, s + i, 1));
    }
    if (unknown) push(e->out, t->h.unk);
}

// Appends the tokens of a word.
static void encode_word(Encoder *e, Piece p) {
    if (e->word_room < 4 * p.n) e->word = resize(e->word, e->word_room = 8 * p.n, 1);
    Text word = {e->word, 0};
    for (size_t i = 0; i < p.n; i++) word.len += put_char(e->word + word.len, p.chars[i]);
    if (word.len > INT_MAX / 4) die("the text is too long: %zu bytes in one word", word.len);
    if (e->room <= word.len) {
        for (e->room = 64; e->room <= word.len;) e->room *= 2;
        e->symbols = resize(e->symbols, e->room, sizeof *e->symbols);
        e->winners = resize(e->winners, e->room, 2 * sizeof *e->winners);
    }
    encode_symbols(e, word);
    while (e->winners[1] > -INFINITY) {
        int i = 1;
        while (i < e->leaves) i = 2 * i + (e->winners[2 * i] < e->winners[2 * i + 1]);
        Symbol *a = &e->symbols[i - e->leaves], *b = &e->symbols[a->next];
        a->id = a->joined;
        a->len += b->len;
        b->len = 0;
        a->next = b->next;
        e->symbols[a->next].prev = i - e->leaves;
        encode_pair(e, (int)(b - e->symbols));
        encode_pair(e, a->prev);
        encode_pair(e, i - e->leaves);
    }
    encode_end(e);
}

// Whether a character is in a set of atoms.
static bool char_is(const Tokenizer *t, int c, uint64_t set) {
    return set >> t->atoms[c & CODE] & 1;
}

// The end of the match of a pattern, from an element on, at a place in a piece; 0: there is none.
static size_t pattern_match(Encoder *e, Piece p, size_t from, const Element *x) {
    if (!e->budget--) die("%s: its patterns take too long for this text", e->t->path);
    for (;; x = &e->t->elements[x->otherwise]) {
        size_t at = from, least = x->least, end;
        while (at < p.n && at - from < x->most && char_is(e->t, p.chars[at], x->set)) at++;
        if (x->kind >= FOLLOWED) {
            least = (at > from) == (x->kind == FOLLOWED) ? 0 : SIZE_MAX;  // SIZE_MAX: does not fit
            at = from;
        }
        for (; at - from >= least; at--) {
            end = x->next ? pattern_match(e, p, at, &e->t->elements[x->next]) : at;
            if (end) return end;
            if (at == from || x->kind != TAKE) break;
        }
        if (!x->otherwise) return 0;
    }
}

static void encode_split(Encoder *e, Piece p, uint32_t step) {
    const Step *s = &e->t->steps[step];
    size_t start = 0;
    bool before = false;
    for (size_t from = 0, to; from < p.n; from = to) {  // a match, or a character without
        to = pattern_match(e, p, from, &e->t->elements[s->element]);
        bool match = to > from;  // an empty one is none
        if (!match) to = from + 1;
        if (from && (before || match) && s->how >> (2 * before + match) & 1) {
            if (!(s->how >> (4 + before) & 1)) encode_part(e, p, start, from, step + 1);
            start = from;
        }
        before = match;
    }
    if (!(s->how >> (4 + before) & 1)) encode_part(e, p, start, p.n, step + 1);
}

// The longest added token at a place (its id and flags, or -1), and where it ends; `normalized`:
// which of them. One that only counts untyped (a control token) is none where something is typed.
static int added_at(const Tokenizer *t, Piece p, size_t at, int normalized, size_t *end) {
    int node = normalized, typed = 0, longest = -1;
    for (; at < p.n; at++) {
        node = index_find(t, key_of(OF_NODE, node, p.chars[at] & CODE));
        if (node < 0) break;
        typed |= p.chars[at] & TYPED;
        int added = index_find(t, key_of(OF_END, node, 0));
        if (added >= 0 && !(typed && added & ONLY_UNTYPED)) longest = added, *end = at + 1;
    }
    return longest;
}

static void encode_find(Encoder *e, Piece p, uint32_t step) {
    const Tokenizer *t = e->t;
    uint64_t word = t->h.word, white = t->h.white;
    size_t from = 0;
    for (size_t i = 0; i < p.n;) {
        size_t start = i, end = i + 1;
        int added = added_at(t, p, i, t->steps[step].how, &end);
        i = end;
        if (added < 0 || (added & SINGLE_WORD &&
                          ((start && char_is(t, p.chars[start - 1], word)) ||
                           (end < p.n && char_is(t, p.chars[end], word))))) continue;
        if (added & LSTRIP)
            while (start > from && char_is(t, p.chars[start - 1], white)) start--;
        if (added & RSTRIP)
            while (end < p.n && char_is(t, p.chars[end], white)) end++;
        if (from < start) encode_part(e, p, from, start, step + 1);
        push(e->out, added >> 5);
        from = end;
    }
    encode_part(e, p, from, p.n, step + 1);
}

// Whether a text stands at a place: -1: it does not; TYPED: it does, and some of it is typed.
static int piece_has(Piece p, size_t at, const Ids *text) {
    int typed = 0;
    if (text->n > p.n - at) return -1;
    for (size_t i = 0; i < text->n; i++, at++) {
        if ((p.chars[at] & CODE) != text->ids[i]) return -1;
        typed |= p.chars[at] & TYPED;
    }
    return typed;
}
static void change_replace(const Encoder *e, Piece p, const Step *s, Ids *out) {
    Ids from = {0}, to = {0};
    push_text(&from, (Text){s->from, s->n_from}, NULL);
    push_text(&to, (Text){s->to, s->n_to}, NULL);
    bool in_front = !from.n && (p.first ? e->text_start : !(s->how & 2)) &&
                    !(s->how & 1 && piece_has(p, 0, &to) >= 0);
    for (size_t j = 0; j < to.n && in_front; j++) push(out, to.ids[j]);
    for (size_t i = 0; i < p.n;) {
        int typed = from.n ? piece_has(p, i, &from) : -1;
        for (size_t j = 0; j < to.n && typed >= 0; j++) push(out, to.ids[j] | typed);
        if (typed < 0) push(out, p.chars[i]);
        i += typed < 0 ? 1 : from.n;
    }
    free(from.ids), free(to.ids);
}

static int class_of(const Tokenizer *t, int c) { return t->marks[c & CODE]; }
// Appends a character, taken apart by the forms before one, with its marks in their order.
static void form_take(const Tokenizer *t, Ids *out, int c, int before) {
    int form = index_find(t, key_of(OF_WHOLE, c & CODE, 0)), typed = c & TYPED;
    if (form >= 0 && form < before) {
        int second = (int)(t->forms[form].second & INT32_MAX);
        form_take(t, out, (int)t->forms[form].first | typed, form);
        if (second) form_take(t, out, second | typed, form);
        return;
    }
    push(out, c);
    int *p = out->ids + out->n - 1;
    for (; class_of(t, c) && p > out->ids && class_of(t, p[-1]) > class_of(t, c); p--) p[0] = p[-1];
    *p = c;
}
static void change_form(const Encoder *e, Piece p, Ids *out) {
    const Tokenizer *t = e->t;
    size_t n = 0, starter = 0;
    for (size_t i = 0; i < p.n; i++) form_take(t, out, p.chars[i], INT_MAX);
    for (size_t i = 0; i < out->n; i++) {  // what begins with a starter is joined
        int c = out->ids[i], class = class_of(t, c), *first = &out->ids[starter], form = -1;
        if (n && !class_of(t, *first) && (starter == n - 1 || class_of(t, out->ids[n - 1]) < class))
            form = index_find(t, key_of(OF_PARTS, *first & CODE, c & CODE));
        if (form >= 0) *first = (int)t->forms[form].whole | ((*first | c) & TYPED);
        else if (out->ids[n++] = c, !class) starter = n - 1;
    }
    out->n = n;
}

// Takes a piece through a step and all that follow it.
static void encode_piece(Encoder *e, Piece p, uint32_t step) {
    const Step *s = &e->t->steps[step];
    Ids changed = {0};
    if (!p.n) return;
    if (step == e->t->h.n_steps) encode_word(e, p);
    else if (s->kind == FIND) encode_find(e, p, step);
    else if (s->kind == SPLIT) encode_split(e, p, step);
    else if (e->t->h.flags & BARE) encode_piece(e, p, step + 1);
    else {
        if (s->kind == REPLACE) change_replace(e, p, s, &changed);
        else change_form(e, p, &changed);
        encode_piece(e, (Piece){changed.ids, changed.n, p.first}, step + 1);
    }
    free(changed.ids);
}

// Appends the tokens of a text. At a text's start BOS and what the steps write in front come first,
// if it does not begin with BOS. Control tokens are not recognised where a byte is marked as typed.
static void encode(const Tokenizer *t, Text text, const char *typed, bool text_start, Ids *out) {
    if (text.len > INT_MAX / 4) die("the text is too long: %zu bytes", text.len);
    Encoder e = {.t = t, .out = out, .text_start = text_start, .budget = (text.len + 1) << 12};
    bool bos = text_start && t->h.flags & ADD_BOS && t->h.bos >= 0;
    size_t start = out->n + bos;
    Ids chars = {0};
    push_text(&chars, text, typed);
    idle++;  // it can take long, and nothing is lost: a signal ends the program
    if (bos) push(out, t->h.bos);
    encode_piece(&e, (Piece){chars.ids, chars.n, true}, 0);
    if (bos && out->n > start && out->ids[start] == t->h.bos)  // it has one itself
        memmove(out->ids + start, out->ids + start + 1, (--out->n - start) * sizeof(int));
    free(chars.ids), free(e.word), free(e.symbols), free(e.winners);
    idle--;
}

// The text of a token that follows another (-1: nothing). Control tokens have none; the space that
// was put in front of the first word is dropped.
static Text decode(const Tokenizer *t, int previous, int id) {
    int type = id >= 0 && id < t->h.vocab_size ? t->tokens[id].type : UNUSED;
    if (type == UNUSED || (type == CONTROL && !t->llama2c)) return (Text){"", 0};
    Text text = t->tokens[id].text;
    bool drop = previous == t->h.bos && t->h.flags & DROP_SPACE && text.len && *text.s == ' ';
    return (Text){text.s + drop, text.len - drop};
}

static bool is_stop(const Tokenizer *t, int id) {
    for (uint32_t i = 0; i < t->h.n_stops; i++)
        if (t->stops[i] == id) return true;
    return id == t->h.eos;
}
// =================================================================================================
// [4] Speed: the same mathematics for SIMD units and threads
// =================================================================================================
//
// Nothing here changes a bit of a result, so a reader may skip it; with -DPLAIN it is left out.
#ifndef PLAIN

// ---- [4.1] threads ------------------------------------------------------------------------------
// parallel deals the items of a job out: one number holds the job's number and the count of items
// that nobody has taken; a thread takes a share of what is left by one compare-and-swap, so that
// one that is not running holds nobody up for long. What threads write has cache lines of its own.

enum { LINES = 128 };
static struct {
    _Alignas(LINES) _Atomic uint64_t left;  // job << 32 | items left
    _Alignas(LINES) _Atomic int done;
    _Alignas(LINES) Task *task;             // these are set while no job has items
    void *context;
    _Atomic int n_items, n_threads;
    double measured, ran;                   // when was looked at how long the first thread ran
    double alone_until, penalty;            // until when it works alone; how long
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} pool = {.n_threads = 1, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static bool pool_idle(void) { return !(uint32_t)atomic_load(&pool.left); }

// Takes items and does them until none is left.
static void work(void) {
    uint64_t was = atomic_load(&pool.left);
    while ((uint32_t)was) {
        int left = (int)(uint32_t)was, take = (left - 1) / (2 * pool.n_threads) + 1;
        if (!atomic_compare_exchange_weak(&pool.left, &was, was - (uint64_t)take)) continue;
        for (int item = pool.n_items - left, end = item + take; item < end; item++)
            pool.task(pool.context, item);  // NOLINT: it is set where there are items
        atomic_fetch_add(&pool.done, take);
        was = atomic_load(&pool.left);
    }
}

// A moment of waiting, since a time that the first one notes. False after 50 microseconds: time to
// sleep. (To read the clock disturbs a core's other thread no more than a pause instruction.)
static bool spin(double *since) {
    double now = seconds();
    if (*since == 0) *since = now;
    return now - *since < 50e-6;
}

static void *worker(void *argument) {
    this_thread = (int)(intptr_t)argument;
    for (;; work()) {
        for (double since = 0; pool_idle() && spin(&since);) {}
        if (!pool_idle()) continue;
        pthread_mutex_lock(&pool.mutex);
        while (pool_idle()) pthread_cond_wait(&pool.wake, &pool.mutex);
        pthread_mutex_unlock(&pool.mutex);
    }
    return NULL;
}

// Where another program has a core, a thread with items may not be running, for which the first one
// waits, or it is not running itself. If it lost a quarter of some milliseconds so, it works alone
// for a while, and for longer if that happens again soon after. (Long jobs even that out.)
static bool pool_alone(void) {
    double now = seconds(), wall = now - pool.measured;
    if (now < pool.alone_until || wall < 2e-3) return now < pool.alone_until;
    double ran = seconds_of(CLOCK_THREAD_CPUTIME_ID), lost = wall - (ran - pool.ran);
    pool.measured = now, pool.ran = ran;
    if (wall > 0.05 || lost < wall / 4) return false;
    bool again = now < pool.alone_until + 2 * pool.penalty + 0.02;
    pool.penalty = again ? fmin(2 * pool.penalty, 0.4) : 4e-3;
    pool.alone_until = now + pool.penalty;
    return true;
}

static void parallel(Task *task, void *context, int n) {
    double since = 0;
    if (n < 2 || pool.n_threads == 1 || pool_alone()) {
        for (int i = 0; i < n; i++) task(context, i);
        return;
    }
    pool.task = task, pool.context = context, pool.n_items = n;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.left, ((atomic_load(&pool.left) >> 32) + 1) << 32 | (uint32_t)n);
    pthread_cond_broadcast(&pool.wake);  // a thread that is about to sleep may miss one job
    work();
    while (atomic_load(&pool.done) != n) if (!spin(&since)) usleep(20);
}

// ---- [4.2] large pages --------------------------------------------------------------------------
// A model in the page cache is mapped in pages of 4 KiB, and looking these up can cost half of the
// memory's speed. So where there is plenty of memory the file is copied into pages of 2 MiB.

#ifndef MADV_HUGEPAGE
static const uint8_t *map_weights(const char *path, size_t *size) { return map_file(path, size); }
#else
// Bytes of memory that this process may use: what is free, and within its control group's limit.
static uint64_t free_memory(void) {
    uint64_t free_bytes = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    char line[32] = "";
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r");
    uint64_t limit = f && fgets(line, sizeof line, f) ? strtoull(line, NULL, 10) : 0;  // "max": 0
    if (f) fclose(f);
    return limit && limit < free_bytes ? limit : free_bytes;
}

enum { LARGE_PAGE = 1 << 21 };
typedef struct { uint8_t *to; const uint8_t *from; size_t size; } CopyJob;
static void copy_task(void *context, int item) {
    const CopyJob *job = context;
    size_t at = (size_t)item * LARGE_PAGE, left = job->size - at;
    memcpy(job->to + at, job->from + at, left < LARGE_PAGE ? left : LARGE_PAGE);
}
static const uint8_t *map_weights(const char *path, size_t *size) {
    const uint8_t *file = map_file(path, size);
    if (*size < 4 * LARGE_PAGE || *size > free_memory() / 2) return file;
    void *space = mmap(NULL, *size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return file;
    CopyJob job = {space, file, *size};
    madvise(space, *size, MADV_HUGEPAGE);
    madvise((void *)(uintptr_t)file, *size, MADV_WILLNEED);
    parallel(copy_task, &job, (int)((*size + LARGE_PAGE - 1) / LARGE_PAGE));
    munmap((void *)(uintptr_t)file, *size);
    return space;
}
#endif

// ---- [4.3] SIMD ---------------------------------------------------------------------------------
// A vector has W lanes; a lane is a row of a panel. GCC's and clang's vector types do the
// arithmetic; what they lack is here, once for each instruction set:
//     dot        acc[lane] += the four bytes of w[lane] times the four bytes at x
//     load_half  W half-precision numbers to float
// BIAS8 is what is added to int8 weights before dot, where dot takes unsigned weights.

#if defined __x86_64__ || defined __i386__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#if defined __AVX512BW__ && defined __AVX512VL__ && defined __AVX512VNNI__
#define AVX512
#define DPBUSD _mm512_dpbusd_epi32
static const char isa[] = "AVX-512 VNNI";
typedef __m512i mm;
enum { W = 16 };
#elif defined __AVX2__
#ifdef __AVXVNNI__
#define DPBUSD _mm256_dpbusd_epi32
static const char isa[] = "AVX2 VNNI";
#else
static const char isa[] = "AVX2";
#endif
typedef __m256i mm;
enum { W = 8 };
#else
enum { W = 4 };
#endif

enum { H = PANEL / W };  // vectors of a panel's rows
typedef float vf __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")  // of loops over accumulators: these stay in registers
#endif

INLINE vf load(const void *p) { return *(const vf_unaligned *)p; }
INLINE void store(void *p, vf v) { *(vf_unaligned *)p = v; }
INLINE vi splat_i(int32_t x) { return x - (vi){0}; }
INLINE int32_t read_4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return v; }
INLINE vu load_16bit(const void *p) {
    vh packed;
    memcpy(&packed, p, sizeof packed);
    return __builtin_convertvector(packed, vu);
}

#ifdef AVX512
INLINE vf load_half(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
#elif defined __AVX2__ && defined __F16C__
INLINE vf load_half(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
#elif defined __aarch64__
INLINE vf load_half(const void *p) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
#else
INLINE vf load_half(const void *p) {  // as half_to_float
    vu h = load_16bit(p), x = (vu)((vf)((h & 0x7fff) << 13) * 0x1p112f);
    return (vf)(x | ((vu)((h & 0x7c00) == 0x7c00) & 0x7f800000) | (h & 0x8000) << 16);
}
#endif

#ifdef DPBUSD
#define BIAS8 128
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    return (vi)DPBUSD((mm)acc, (mm)w, (mm)splat_i(read_4(x)));
}
#elif defined __AVX2__
// maddubs multiplies unsigned by signed bytes and adds pairs of the products to 16 bits, which hold
// the sum of a whole block of 4-bit weights: 32 / 2 * 15 * 127 < 2^15. (The empty asm keeps GCC
// from adding up in another order, for which the registers would not do.)
#define SHORT_SUMS 1
INLINE vs maddubs(vu w, vi x) { return (vs)_mm256_maddubs_epi16((mm)w, (mm)x); }
INLINE vi add_pairs(vi sums) { return (vi)_mm256_madd_epi16((mm)sums, (mm)splat_i(0x00010001)); }
INLINE vi dot_4bit(vi sums, vu w, const int8_t *x) {
    vs sum = (vs)sums + maddubs(w, splat_i(read_4(x)));
    __asm__("" : "+x"(sum));
    return (vi)sum;
}
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    vi moved = (vi)_mm256_sign_epi8((mm)splat_i(read_4(x)), (mm)w);  // the sign, from w to x
    acc += add_pairs((vi)maddubs((vu)_mm256_abs_epi8((mm)w), moved));
    __asm__("" : "+x"(acc));
    return acc;
}
#elif defined __SSE2__
// Bytes become 16-bit numbers, even and odd ones apart; madd multiplies and adds pairs of these.
static const char isa[] = "SSE2";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    vs xs = (vs)splat_i(read_4(x));
    acc += (vi)_mm_madd_epi16((__m128i)((vs)((vs)w << 8) >> 8), (__m128i)((vs)(xs << 8) >> 8));
    return acc + (vi)_mm_madd_epi16((__m128i)((vs)w >> 8), (__m128i)(xs >> 8));
}
#elif defined __ARM_FEATURE_DOTPROD
static const char isa[] = "NEON dotprod";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w,
                         vreinterpretq_s8_s32(vdupq_n_s32(read_4(x))));
}
#else
// Even bytes and odd ones are multiplied apart; the sum of two products still has 16 bits.
static const char isa[] = "generic";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    vs xs = (vs)splat_i(read_4(x));
    vi sums = (vi)(((vs)w << 8 >> 8) * (xs << 8 >> 8) + ((vs)w >> 8) * (xs >> 8));
    return acc + (sums << 16 >> 16) + (sums >> 16);
}
#endif

#ifndef BIAS8
#define BIAS8 0
#endif
#ifndef SHORT_SUMS
#define SHORT_SUMS 0
#define dot_4bit dot
INLINE vi add_pairs(vi sums) { return sums; }
#endif

// ---- [4.4] kernels ------------------------------------------------------------------------------
// A kernel multiplies panels with the inputs of T tokens, whose sums stay in registers; T and dtype
// are constants of each. It goes over the columns one by one, or over blocks where they are
// quantized. For many tokens weights of 4 bits are first made bytes and float scales: UNPACKED.

typedef struct {
    const uint8_t *panel;   // the first panel; the others are `apart` bytes apart
    size_t apart;
    int n_panels, cols;     // of the panels, from their beginning on
    const float *x;         // inputs (tokens, x_cols) of floats,
    const Quantized *xq;    // and of integers
    int x_cols, column;     // the column of x from which on the panels are multiplied with it
    int token;              // the first; for number 0 the panels are fetched ahead from memory
    float *out;             // the sums, of tokens `stride` apart; those of a column over 0 are
    int stride;             // added to what is there
} Work;

enum { UNPACKED = Q4A - Q4 + 1, UNPACKED_Q4 = Q4 + UNPACKED, UNPACKED_Q4A = Q4A + UNPACKED };
typedef struct { float scales[PANEL], minima[PANEL]; uint8_t quants[512]; } Unpacked;  // of a block

enum { AHEAD = 8192 };  // bytes: of blocks so far ahead a line is fetched, and the others follow

// Adds the products of a block and the inputs at a place to acc: number t * H + h.
INLINE void add_block(vf *acc, const int T, const int dtype, const Work *w, const uint8_t *block,
                      size_t at) {
    const bool unpacked = dtype > Q4A, nibbles = dtype == Q4 || dtype == Q4A;  // two in a byte
    const bool minimum = dtype == Q4A || dtype == UNPACKED_Q4A;
    const bool late = SHORT_SUMS && dtype != Q8;  // the bias does not fit into 16 bits
    const int bias8 = dtype == Q8 ? BIAS8 / 8 : !minimum;  // an eighth of the quants' offset
    const int steps = (nibbles ? 4 : 8) * H;
    const int quants = unpacked ? (int)offsetof(Unpacked, quants) : scale_bytes(dtype);
    const int8_t *x = w->xq->q + at * BLOCK;
    vi sum[TILE];
    for (int i = 0; i < T * H; i++)
        sum[i] = splat_i(bias8 && !late ? w->xq->minus8[at + (size_t)(i / H)] * bias8 : 0);
    UNROLL for (int g = 0; g < steps; g++) {
        vu v = (vu)load(block + quants + g * W * 4), high = v >> 4 & 0x0f0f0f0f;
        if (nibbles) v &= 0x0f0f0f0f;
        else if (dtype == Q8 && BIAS8 != 0) v ^= 0x80808080;
        for (int t = 0; t < T; t++) {
            const int8_t *from = x + t * BLOCK + g / H * 4;
            vi *to = &sum[t * H + g % H];
            *to = dtype == Q8 ? dot(*to, v, from) : dot_4bit(*to, v, from);  // NOLINT: or one
            if (nibbles) *to = dot_4bit(*to, high, from + 16);
        }
    }
    for (int i = 0; i < T * H; i++) {
        size_t t = at + (size_t)(i / H);
        const int lane = i % H * W, unit = unpacked ? 4 : 2;
        const uint8_t *scales = block + lane * unit, *minima = scales + PANEL * unit;
        if (late) sum[i] = add_pairs(sum[i]) + (bias8 ? w->xq->minus8[t] * bias8 : 0);
        acc[i] += __builtin_convertvector(sum[i], vf) *
                  (unpacked ? load(scales) : load_half(scales)) * w->xq->d[t];
        if (minimum) acc[i] += (unpacked ? load(minima) : load_half(minima)) * w->xq->dsum[t];
    }
}

// The same of a column of floats.
INLINE void add_column(vf *acc, const int T, const int dtype, const Work *w, const uint8_t *column,
                       size_t at) {
    const float *x = w->x + at;
    vf v[H];
    for (int h = 0; h < H; h++, column += panel_bytes(dtype, 1) / H)
        v[h] = dtype == F32 ? load(column) : dtype == HALF ? load_half(column)
                                                           : (vf)(load_16bit(column) << 16);
    UNROLL for (int i = 0; i < T * H; i++) acc[i] += v[i % H] * x[i / H * w->x_cols];
}

// How many tokens a kernel can have, whose sums fit into registers.
INLINE int most_at_once(const int dtype) {
    return dtype >= Q8 ? TILE / H : W == 16 ? 16 : W == 8 ? 6 : 2;
}
INLINE void kernel(const int T, const int dtype, const Work *w) {
    const bool integers = dtype >= Q8;
    const int step = integers ? BLOCK : 1;  // columns
    const size_t size = dtype > Q4A ? sizeof(Unpacked) : panel_bytes(dtype, step);
    const size_t start =
        integers ? round_at(w->token, w->column / BLOCK, blocks_of(w->x_cols))
                 : (size_t)w->token * (size_t)w->x_cols + (size_t)w->column;
    float *out = row_of(w->out, w->token, w->stride);
    if (T > most_at_once(dtype)) return;
    for (int p = 0; p < w->n_panels; p++, out += PANEL) {
        const uint8_t *from = w->panel + (size_t)p * w->apart;
        size_t at = start;
        vf acc[PANEL];
        UNROLL for (int i = 0; i < T * H; i++)
            acc[i] = w->column ? load(out + i / H * w->stride + i % H * W) : (vf){0};
        for (int c = 0; c < w->cols; c += step, from += size, at += integers ? TILE : 1) {
            for (size_t i = 0; !w->token && i < (T > 1 ? size : 1); i += 64)  // (1: all is slower)
                __builtin_prefetch(from + AHEAD + i, 0, 2);
            if (integers) add_block(acc, T, dtype, w, from, at);
            else add_column(acc, T, dtype, w, from, at);
        }
        UNROLL for (int i = 0; i < T * H; i++) store(out + i / H * w->stride + i % H * W, acc[i]);
    }
}

#define KERNEL(T, dtype) static void kernel_##dtype##_##T(const Work *w) { kernel(T, dtype, w); }
#define ENTRY(T, dtype) [(dtype) + 1][T] = kernel_##dtype##_##T,
#define FOR_TOKENS(X, dtype)                                                                       \
    X(1, dtype) X(2, dtype) X(3, dtype) X(4, dtype) X(5, dtype) X(6, dtype) X(7, dtype)            \
    X(8, dtype) X(16, dtype)
#define FOR_ALL(X)                                                                                 \
    FOR_TOKENS(X, HALF) FOR_TOKENS(X, F32) FOR_TOKENS(X, BF16) FOR_TOKENS(X, Q8)                   \
    FOR_TOKENS(X, Q4) FOR_TOKENS(X, Q4A) FOR_TOKENS(X, UNPACKED_Q4) FOR_TOKENS(X, UNPACKED_Q4A)
FOR_ALL(KERNEL)
static void (*const kernels[][17])(const Work *) = {FOR_ALL(ENTRY)};  // [dtype + 1][tokens at once]

static void unpack(Unpacked *u, int dtype, const uint8_t *block) {
    for (int i = 0; i < 256; i += 4 * W) {
        vu v = (vu)load(block + scale_bytes(dtype) + i);
        store(u->quants + i, (vf)(v & 0x0f0f0f0f));
        store(u->quants + i + 256, (vf)(v >> 4 & 0x0f0f0f0f));
    }
    for (int i = 0; i < PANEL; i += W) {
        store(u->scales + i, load_half(block + i * 2));
        if (dtype == Q4A) store(u->minima + i, load_half(block + (PANEL + i) * 2));
    }
}

// The products of a matrix, from a row on, with n tokens, as many at once as there are kernels for.
static void multiply(Work w, const Matrix *m, int row, int n) {
    int dtype = m->dtype, most = most_at_once(dtype);
    uint8_t *memory = NULL;
    w.panel = panel_of(m, row) + panel_bytes(dtype, w.column % m->cols);
    w.apart = panel_bytes(dtype, m->cols);
    if ((dtype == Q4 || dtype == Q4A) && n * H * H > 4 * TILE) {  // then it is a single panel
        memory = resize(NULL, (size_t)blocks_of(w.cols) + 1, sizeof(Unpacked));
        uint8_t *aligned = memory + (-(uintptr_t)memory & 63);
        for (int b = 0; b < blocks_of(w.cols); b++)
            unpack((Unpacked *)(void *)aligned + b, dtype, w.panel + b * block_bytes(dtype));
        w.panel = aligned;
        dtype += UNPACKED;
    }
    for (int some; w.token < n; w.token += some) {
        some = n - w.token < most ? n - w.token : most;
        if (some > TILE && some < 16) some = TILE;
        kernels[dtype + 1][some](&w);
    }
    free(memory);
}

// ---- [4.5] products -----------------------------------------------------------------------------
// matmul for panels: those of all matrices are dealt out.

static int panels_of(const Matrix *w) { return (w->rows - 1) / PANEL + 1; }
static void panel_task(void *context, int item) {
    const ProductJob *job = context;
    const Product *p = job->p;
    for (; item >= panels_of(&p->w); p++) item -= panels_of(&p->w);
    const Matrix *m = &p->w;
    size_t first = (size_t)p->first, at = first * (size_t)blocks_of(m->cols);  // a whole TILE
    Quantized xq = {job->xq->q + at * BLOCK, job->xq->d + at, job->xq->dsum + at,
                    job->xq->minus8 + at};
    int row = item * PANEL;
    Work w = {.n_panels = 1, .cols = m->cols, .x = job->x + first * (size_t)m->cols, .xq = &xq,
              .x_cols = m->cols, .out = row_of(p->y, p->first, m->rows) + row, .stride = m->rows};
    if (row + PANEL <= m->rows) multiply(w, m, row, p->n ? p->n : job->n);
    else for (; row < m->rows; row++) row_task(&(ProductJob){p, job->x, job->xq, job->n}, row);
}
static void matmul_fast(const Product *p, int n_products, const float *x, const Quantized *xq,
                        int n) {
    int items = 0;
    for (int i = 0; i < n_products; i++) items += panels_of(&p[i].w);
    if (p->w.dtype == ROWS) matmul_plain(p, n_products, x, xq, n);  // then all are
    else {
        quantize_all(p, n_products, x, xq, n);
        parallel(panel_task, &(ProductJob){p, x, xq, n}, items);
    }
}

// ---- [4.6] attention ----------------------------------------------------------------------------
// A tile is a few slots of one sequence at consecutive positions, with one key/value head: all its
// queries pass over the keys and values together, in three steps: scores, weights, average. A tile
// is a piece of work; where there are few, each step is cut into parts: by pages, queries, panels.

typedef struct {
    const Pass *f;
    int group, most;    // query heads of a key/value head; slots of a tile at most
    int width;          // positions of a row of scores, a multiple of 32
    int parts, step;    // parts of a step, and the step that is done; one part: all steps
    size_t area;        // floats that hold a slot's scores and rounded weights
    CacheHead h;        // from here on: the tile
    int slot, n;        // the first slot; queries
    int first, end;     // the positions that any of them sees, in whole blocks
    float *scores;      // (n, width)
    Quantized weights;  // behind the scores: what they become, rounded
} Tile;

static float *query_of(const Tile *t, float *x, int query) {  // where its part of x is
    const Config *c = &t->f->m->c;
    int head = t->h.head * t->group + query % t->group;
    return row_of(x, (t->slot + query / t->group) * c->n_heads + head, c->head_dim);
}

// The end of a tile's positions in the page of one.
static int attend_end(const Tile *t, int pos) {
    int end = (pos / PAGE_POSITIONS + 1) * PAGE_POSITIONS;
    return end < t->end ? end : t->end;
}

// The scores of some pages.
static void attend_scores(const Tile *t, int part) {
    int hd = t->f->m->c.head_dim;
    Quantized rounded = new_quantized(t->n, hd);
    float *queries = resize(NULL, (size_t)(t->n * hd), sizeof(float));
    for (int j = 0; j < t->n; j++) {
        memcpy(row_of(queries, j, hd), query_of(t, t->f->s->q, j), (size_t)hd * sizeof(float));
        quantize(&rounded, j, row_of(queries, j, hd), hd);
    }
    for (int i = t->first, page = 0; i < t->end; i = attend_end(t, i), page++) {
        if (page % t->parts != part) continue;
        Matrix keys = cache_keys(t->f->kv, head_at(&t->h, i));
        Work w = {.n_panels = (attend_end(t, i) - i) / PANEL, .cols = hd, .x = queries,
                  .xq = &rounded, .x_cols = hd, .out = t->scores + i, .stride = t->width};
        multiply(w, &keys, i % PAGE_POSITIONS, t->n);
    }
    free(queries);
    free(rounded.q);
}

// The scores of queries become weights, which are 0 where one does not look.
static void attend_weights(const Tile *t, int part) {
    const Pass *f = t->f;
    for (int j = part; j < t->n; j += t->parts) {
        int n = f->batch[t->slot + j / t->group].pos + 1;
        int first = first_seen(&f->m->c, f->layer, n - 1);
        float *row = row_of(t->scores, j, t->width), x[BLOCK];
        attention_weights(f, t->h.head * t->group + j % t->group, row, first, n);
        for (int i = t->first; i < first; i++) row[i] = 0;
        for (int i = n; i < t->end; i++) row[i] = 0;
        for (int i = t->first; i < t->end && f->kv->dtype == Q8; i += BLOCK) {
            const float *scales = value_scales(f->kv, head_at(&t->h, i)) + i % PAGE_POSITIONS;
            for (int k = 0; k < BLOCK; k++) x[k] = row[i + k] * scales[k];
            round_block(&t->weights, round_at(j, i / BLOCK, t->width / BLOCK), x);
        }
    }
}

// The weighted averages of the values, for some panels of 16 channels.
static void attend_values(const Tile *t, int part) {
    int hd = t->f->m->c.head_dim, wide = ((hd - 1) / PANEL / t->parts + 1) * PANEL;
    int channel = part * wide, some = hd - channel < wide ? hd - channel : wide;
    if (some <= 0) return;
    float *out = zeros((size_t)(t->n * wide), sizeof(float));
    for (int i = t->first; i < t->end; i = attend_end(t, i)) {
        Matrix values = cache_values(t->f->kv, head_at(&t->h, i));
        Work w = {.n_panels = (some - 1) / PANEL + 1, .cols = attend_end(t, i) - i, .x = t->scores,
                  .xq = &t->weights, .x_cols = t->width, .column = i, .out = out, .stride = wide};
        multiply(w, &values, channel, t->n);
    }
    for (int j = 0; j < t->n; j++)
        memcpy(query_of(t, t->f->s->att_out, j) + channel, row_of(out, j, wide),
               (size_t)some * sizeof(float));
    free(out);
}

// Whether a slot belongs to the tile of the one before.
static bool attend_joined(const Tile *t, int i) {
    const Slot *slot = &t->f->batch[i];
    return i % t->most && slot[-1].seq == slot->seq && slot[-1].pos + 1 == slot->pos;
}
static void attend_task(void *context, int item) {
    Tile t = *(const Tile *)context;
    const Pass *f = t.f;
    bool whole = t.parts == 1;
    int part = item % t.parts, i = item / t.parts % f->n, head = item / t.parts / f->n, n = 1;
    if (attend_joined(&t, i)) return;
    while (i + n < f->n && attend_joined(&t, i + n)) n++;
    int pos = f->batch[i].pos, place = whole ? this_thread * t.most : head * f->n + i;
    t.h = (CacheHead){f->kv, f->batch[i].seq, f->layer, head};
    t.slot = i, t.n = n * t.group;
    t.first = first_seen(&f->m->c, f->layer, pos) / BLOCK * BLOCK, t.end = round_up(pos + n, BLOCK);
    t.scores = f->s->scores + (size_t)place * t.area;
    t.weights = quantized_in((uint8_t *)row_of(t.scores, t.n, t.width), t.n, t.width);
    if (t.step == 0) attend_scores(&t, part);
    if (t.step == 1 || whole) attend_weights(&t, part);
    if (t.step == 2 || whole) attend_values(&t, part);
}

static void attention_fast(const Pass *f) {
    const Config *c = &f->m->c;
    int group = c->n_heads / c->n_kv_heads, most = group <= 4 ? 8 : group <= 32 ? 32 / group : 1;
    int longest = 0, tiles = 0, threads = pool.n_threads, items = f->n * c->n_kv_heads;
    Tile t = {.f = f, .group = group, .most = most, .parts = 1};
    for (int i = 0; i < f->n; i++) {
        if (f->batch[i].pos >= longest) longest = f->batch[i].pos + 1;
        if (!attend_joined(&t, i)) tiles += c->n_kv_heads;
    }
    if (threads > 1 && longest > PAGE_POSITIONS) t.parts = (4 * threads - 1) / tiles + 1;
    t.width = round_up(longest + 1, BLOCK);  // 1: a sink
    t.area = (size_t)(2 * round_up(group, TILE)) * (size_t)t.width;  // more than are used
    make_room(&f->s->scores, &f->s->scores_room,
              t.area * (size_t)(t.parts > 1 ? items : threads * most));
    for (; t.step < (t.parts > 1 ? 3 : 1); t.step++) parallel(attend_task, &t, items * t.parts);
}

// Starts up to n - 1 threads beside the calling one, and lets part 1 use what is here.
static void start_threads(int n) {
    pthread_t thread;
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // other signals are the main thread's business
    for (; pool.n_threads < n; pool.n_threads++) {
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.n_threads)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    matmul = matmul_fast, attention = attention_fast;
}

#endif

// ---- [5.1] text in and out ----------------------------------------------------------------------
// What the modes share: options, where text comes from, where results go. Input is read whole
// (input_read). Results stream (stdout, a device) or are collected in memory, for -o until
// output_file makes its file. It keeps what a signal must know. Calls: forward, by prefill.

enum { MAX_LIST = 15 };
typedef struct { const char *of[MAX_LIST]; int n; } List;  // of an option given several times
typedef struct {
    const char *model, *tokenizer, *prompt, *prompt_file, *output, *mode, *system, *draft, *session;
    const char *tool, *each, *reward, *suffix, *completion, *schema;
    List others, stops;
    long long at_once, skip, logprobs, indent;
    long long steps, context, threads, top_k, samples, layer, head;
    double temperature, top_p;  // -1: as the tokenizer's file says
    double min_p, repeat_penalty, dry;
    long long repeat_last;
    unsigned long long seed;
    bool quiet, receipt, best, json, think, trace, quote, help, version, manual;
    Text input, lines; // not options: the text of -i or -f, and of --each
    char **words;      // of the command line
    double started;    // nor this: when the program was
    struct Schema *compiled;  // of --schema
    uint64_t given;    // bit i tells that option i of part 6's table was given
} Options;

typedef struct {
    int fd;            // results stream there; -1: they are collected
    const char *path;  // of -o, or NULL
    char *memory;      // what was collected, or must not be sent yet
    size_t n, capacity;
    size_t start, thought;  // where in the memory the model's own text begins, and its open thought
    bool terminal;     // control characters are shown instead of sent
    bool filter, thinking;  // <think> is looked for; is open
    bool mute;         // text is not written: there is something else instead
    bool line;         // white space before the model's text is left out; it ends with its line
    const List *stops; // the model's text ends before the first of these; NULL: of none
    bool stopped;      // it did
    int columns, column;  // text wider than so many is broken between words; where its line is
} Output;
typedef void Mode(const Options *o, const Model *m, const Tokenizer *t, Output *out);

static volatile sig_atomic_t interrupted;  // by a signal; a second one ends the program
static volatile sig_atomic_t dimmed;       // a terminal that writes dimmed text: set back at exit
static volatile sig_atomic_t progress;     // a terminal shows how far the work is: cleared at exit
static volatile pid_t running_tool;        // ends with the program
static bool unfinished;                    // a part of the work could not be done: status 1

// Sets a terminal's modes for chat: keys come one by one and are not shown, pastes are marked; or
// sets back what they were.
static struct termios terminal_modes;
static volatile sig_atomic_t terminal_raw;  // 2: it was, and must be set again
static void terminal_set(bool raw) {
    struct termios t = terminal_modes;
    if (raw == terminal_raw || (raw && !terminal_raw && tcgetattr(0, &t))) return;
    if (raw) terminal_modes = t, t.c_lflag &= (tcflag_t)~(ICANON | ECHO);
    terminal_raw = raw;
    tcsetattr(0, TCSADRAIN, &t);
    if (write(2, raw ? "\033[?2004h" : "\033[?2004l", 8) < 0) {}
}

// What must not outlive the program; a signal may call it.
static void output_leave(void) {
    terminal_set(false);
    if (running_tool > 0) kill(-running_tool, SIGKILL);
    if (dimmed && write(dimmed, "\033[0m", 4) < 0) {}
    if (progress && write(2, "\r\033[K", 4) < 0) {}
}

static bool output_send(int fd, const char *p, size_t n) {  // all of it, or errno says why not
    for (ssize_t sent; n; p += sent, n -= (size_t)sent) {
        sent = write(fd, p, n < 1 << 30 ? n : 1 << 30);  // macOS takes no more at once
        if (sent < 0) return errno == EINTR && output_send(fd, p, n);
    }
    return true;
}

// Writes a file whole or not at all: it gets its name at the end, and signals wait for that.
// Returns NULL, or what is wrong. Without data it only tries.
static const char *file_replace(const char *path, const void *data, size_t n) {
    char target[PATH_MAX], part[PATH_MAX + 32];
    struct stat st;
    sigset_t all, old;
    const char *name = realpath(path, target) ? target : path;  // where a link leads to
    bool exists = !stat(path, &st);
    if (!exists && errno != ENOENT) return strerror(errno);
    if (!exists && readlink(path, target, 1) > 0) return "it is a link to what is not there";
    if (exists && !S_ISREG(st.st_mode)) return "it is not a file that can be written";
    const char *slash = strrchr(name, '/');
    snprintf(part, sizeof part, "%.*s.%.9f", slash ? (int)(slash - name) + 1 : 0, name, seconds());
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int fd = open(part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (exists && fd >= 0) fchmod(fd, st.st_mode & 0777);
    bool whole = fd >= 0 && output_send(fd, data, n) && !fsync(fd);
    const char *wrong = whole && (!data || !rename(part, name)) ? NULL : strerror(errno);
    if (fd >= 0) close(fd), unlink(part);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return wrong;
}

// Makes the file of -o, if it is one; without data only tries.
static void output_file(const Output *out, const void *data) {
    const char *wrong = out->path && out->fd < 0 ? file_replace(out->path, data, out->n) : NULL;
    if (wrong) die("cannot write %s: %s", out->path, wrong);
}
static Output output_open(const char *path) {
    Output out = {.fd = 1, .path = path && strcmp(path, "-") ? path : NULL};
    struct stat st;
    bool device = out.path && !stat(path, &st) && !S_ISREG(st.st_mode);  // or a pipe
    if (out.path) out.fd = device ? open(path, O_WRONLY | O_CLOEXEC) : -1;
    output_file(&out, NULL);
    out.terminal = isatty(out.fd);
    return out;
}

// Adds bytes. What streams is sent, but for the last `keep` bytes (SIZE_MAX: nothing is).
static void output_put(Output *out, const void *data, size_t n, size_t keep) {
    if (!out->memory || out->n + n > out->capacity)
        out->memory = resize(out->memory, out->capacity = 2 * (out->n + n), 1);
    if (n) memcpy(out->memory + out->n, data, n);
    out->n += n;
    if (out->fd < 0 || out->n <= keep) return;
    if (!output_send(out->fd, out->memory, out->n - keep)) {
        if (errno == EPIPE) exit(0);  // the reader has seen enough
        die("cannot write %s: %s", out->path ? out->path : "stdout", strerror(errno));
    }
    memmove(out->memory, out->memory + out->n - keep, keep);
    out->n = keep;
    out->start = out->thought = 0;
}
static void output_write(Output *out, const void *data, size_t n) { output_put(out, data, n, 0); }

// Adds what printf would print; it is sent with what follows, or at the end.
static __attribute__((format(printf, 2, 3)))
void output_print(Output *out, const char *format, ...) {
    char s[1 << 13];  // no path is longer than half of it
    va_list args;
    va_start(args, format);
    output_put(out, s, (size_t)vsnprintf(s, sizeof s, format, args), SIZE_MAX);
    va_end(args);
}

// Adds a byte of text. On a terminal control characters become ^C, those over U+0080 spaces. A line
// that is nearly full, with room for a long word, ends at the next space.
static void output_byte(Output *out, char byte) {
    uint8_t c = (uint8_t)byte, last = out->n ? (uint8_t)out->memory[out->n - 1] : 0;
    if (c == ' ' && out->columns && out->column > out->columns - 14) c = '\n';
    out->column += (c >> 6 != 2) + (c >= 0xe3);  // characters from U+3000 on are wide
    if (c == '\n' || !out->columns) out->column = 0;
    else if (out->column > out->columns) out->column -= out->columns;
    bool control = (c < 32 && c != '\n' && c != '\t') || c == 127;
    if (out->terminal && control) output_put(out, "^", 1, SIZE_MAX);
    if (out->terminal && (control || (last == 0xc2 && c >> 5 == 4))) c = control ? c ^ 64 : 0xa0;
    output_put(out, &c, 1, SIZE_MAX);
}

// Reasoning models write thoughts between these. A terminal shows them dimmed, without the tags;
// elsewhere they stay in the memory and are dropped when they end, unless --think keeps all.
static const char *const output_tags[] = {"<think>", "</think>"};
static bool text_ends(const char *s, size_t n, const char *end) {
    size_t len = strlen(end);
    return n >= len && !memcmp(s + n - len, end, len);
}
static void output_dim(Output *out, bool dim) {
    if (out->terminal) output_put(out, dim ? "\033[2m" : "\033[0m", 4, SIZE_MAX);
    if (out->terminal && out->fd >= 0) dimmed = dim ? out->fd : 0;
}
// Begins a thought, or ends it, at a tag, which takes the memory's last bytes.
static void output_think(Output *out, size_t tag) {
    out->thinking = !out->thinking;
    out->thought = out->n = out->thinking || out->terminal ? out->n - tag : out->thought;
    output_dim(out, out->thinking);
}

// How much the model's own text ends with of the beginning of something.
static size_t output_match(const Output *out, const char *what) {
    size_t n = strlen(what), own = out->n - out->start;
    while (n && (n > own || memcmp(out->memory + out->n - n, what, n))) n--;
    return n;
}
// Adds text and sends it, up to a stop. A beginning of one, of a tag or of a character waits.
static void output_text(Output *out, Text text) {
    int n_stops = out->stops ? out->stops->n : 0;
    size_t keep = 0;
    for (size_t i = 0; i < text.len && !out->stopped && !out->mute; i++) {
        bool line = out->line && !out->thinking;
        bool blank = text.s[i] && strchr(" \t\r\n", text.s[i]);
        if (line && blank && out->n == out->start) continue;
        out->stopped = line && text.s[i] == '\n';
        if (!out->stopped) output_byte(out, text.s[i]);
        keep = 0;
        for (int k = out->filter ? -1 : 0; k < n_stops && !out->stopped; k++) {
            const char *end = k < 0 ? output_tags[out->thinking] : out->stops->of[k];
            size_t n = output_match(out, end);
            if (n < strlen(end)) keep = n > keep ? n : keep;
            else if (k < 0) output_think(out, n);
            else out->stopped = true, out->n -= n, keep = 0;
        }
    }
    for (size_t n = 1; n < 4 && n <= out->n; n++)  // 0xc0, 0xe0, 0xf0: the first byte of two, ...
        if ((uint8_t)out->memory[out->n - n] >= 256 - (128 >> n) && keep < n) keep = n;
    if (out->thinking && !out->terminal) keep = out->n - out->thought;
    if (text.len) output_put(out, NULL, 0, keep);
}

// Adds a text as a string of JSON. What is not UTF-8 becomes U+FFFD.
static void output_json(Output *out, Text text) {
    static const char special[] = "\"\\\n\t\r\b\f", names[] = "\"\\ntrbf";
    output_print(out, "\"");
    for (size_t used; text.len; text.s += used, text.len -= used) {
        uint32_t c = next_char(text.s, text.len, &used);
        const char *at = c && c < 128 ? strchr(special, (int)c) : NULL;
        if (at) output_print(out, "\\%c", names[at - special]);
        else if (c < 32) output_print(out, "\\u%04x", c);
        else if (c == 0xfffd) output_print(out, "\xef\xbf\xbd");
        else output_put(out, text.s, used, SIZE_MAX);
    }
    output_print(out, "\"");
}

// Begins the model's text behind a prompt, which may have opened a thought.
static void output_begin(Output *out, const Options *o, const Tokenizer *t, Text prompt) {
    out->filter = t->chat_flags[USER_AFTER] & THOUGHTS && (out->terminal || !o->think);
    out->stops = &o->stops;
    out->stopped = false;
    out->start = out->n;
    for (size_t n = 1; out->filter && n <= prompt.len; n++)
        if (text_ends(prompt.s, n, output_tags[out->thinking])) output_think(out, 0);
}
// Ends it: a thought that has no end; with what is held back, and a newline.
static void output_end(Output *out) {
    if (out->thinking) {
        fputs("run: an answer ended within its thought: -n gives it more tokens\n", stderr);
        output_think(out, 0);
    }
    if (!out->mute) output_write(out, "\n", 1);
}

// Whether two paths name one file, or, where there is none yet, are the same words.
static bool same_file(const char *a, const char *b) {
    struct stat x, y;
    if (!a || !b || !strcmp(a, "-")) return false;
    if (stat(a, &x) || stat(b, &y)) return !strcmp(a, b);
    return S_ISREG(x.st_mode) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// What a mode reads, for errors.
static const char *input_name(const Options *o) {
    const char *path = o->prompt_file ? o->prompt_file : "the text of -i";
    return strcmp(path, "-") ? path : "stdin";
}

// What is in a file, or stdin ("-"), or without a path the text, and a zero byte. A prompt's file
// may begin with a byte order mark, which is no part of it.
static Text input_read(const char *path, const char *text, bool is_prompt) {
    char part[1 << 16];
    Output in = {.fd = -1};
    if (!path && text) output_write(&in, text, strlen(text));
    int fd = path && strcmp(path, "-") ? open(path, O_RDONLY) : 0;
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    for (ssize_t got = path != NULL; got; output_write(&in, part, (size_t)got)) {
        got = read(fd, part, sizeof part);
        if (got < 0) die("cannot read %s: %s", fd ? path : "stdin", strerror(errno));
    }
    if (fd) close(fd);
    output_write(&in, "", 1);
    if (is_prompt && path && !strncmp(in.memory, "\xef\xbb\xbf", 3))
        memmove(in.memory, in.memory + 3, in.n -= 3);
    return (Text){in.memory, in.n - 1};
}

// A text with another one in the place of each mark. To be freed.
static Text text_fill(Text text, const char *mark, Text by) {
    Output all = {.fd = -1};
    for (size_t n, len = strlen(mark); text.len; text.s += n, text.len -= n) {
        bool here = text.len >= len && !memcmp(text.s, mark, len);
        n = here ? len : 1;
        output_write(&all, here ? by.s : text.s, here ? by.len : 1);
    }
    output_write(&all, "", 1);
    return (Text){all.memory, all.n - 1};
}
// A line on the terminal's stderr: what part of so many bytes or tokens is done, how fast, and the
// time left.
static void progress_show(const Options *o, double began, double part, double n, const char *what) {
    double took = seconds() - began;
    if (o->quiet || !isatty(2)) return;
    bool was = progress;
    progress = part < 1 && !interrupted;
    if (progress) fprintf(stderr, "\r%3.0f%%  %.0f %s/s  %.0f s left  ", 100 * part,
                          part * n / took, what, took / part - took);
    else if (was) fprintf(stderr, "\r%50s\r", "");
}

static int context_of(const Options *o, const Model *m) {
    if (o->context > m->c.seq_len)
        die("-c %lld is more than the %d positions of %s", o->context, m->c.seq_len, m->path);
    return o->context ? (int)o->context : m->c.seq_len;
}

// Runs tokens ids[from..to) through the model, MAX_BATCH at a time. Returns the last one's logits.
static float *prefill(const Model *m, Cache *kv, int seq, const int *ids, int from, int to) {
    Slot batch[MAX_BATCH];
    float *logits = NULL;
    for (int n = 0; from < to && !interrupted; from += n) {
        for (n = 0; n < MAX_BATCH && from + n < to; n++)
            batch[n] = (Slot){ids[from + n], from + n, seq, from + n == to - 1};
        logits = forward(m, kv, batch, n);
    }
    return logits;
}
// ---- [5.2] chat format and likelihood -----------------------------------------------------------
// How a conversation is written down for the model (prompt_turn, prompt_encode), how tokens are
// drawn and written (sampler_new, output_token), how likely a text is (given_likelihood). It keeps
// the date.

// A text: its tokens, of which the cache holds the first `done`, a session's file the first
// `saved`, and of which `keep` stay when the context is full. It ends in a thought (2) or not (1).
typedef struct { Ids ids; int done, keep, saved, thought; } Context;

// What the model is to read; `typed` marks what a user typed (no special tokens there).
typedef struct { char *s, *typed; size_t n; } Prompt;
static void prompt_append(Prompt *p, Text text, bool typed) {
    p->s = resize(p->s, p->n + text.len + 1, 1);
    p->typed = resize(p->typed, p->n + text.len + 1, 1);
    if (text.len) memcpy(p->s + p->n, text.s, text.len);
    memset(p->typed + p->n, typed, text.len);
    p->n += text.len;
    p->s[p->n] = 0;
}
static void prompt_free(Prompt *p) { free(p->s), free(p->typed); }

// Appends a piece of the chat format, with the date (in UTC where SOURCE_DATE_EPOCH fixes it).
static void prompt_piece(Prompt *p, const Tokenizer *t, int piece) {
    static char s[1 << 16];
    static time_t now;  // when the chat began
    const char *fixed = getenv("SOURCE_DATE_EPOCH");
    Text text = t->chat[piece];
    if (fixed || !now) now = fixed ? (time_t)(uint32_t)strtoul(fixed, NULL, 10) : time(NULL);
    const struct tm *date = fixed ? gmtime(&now) : localtime(&now);
    if (t->chat_flags[piece] & DATE) text = (Text){s, strftime(s, sizeof s, text.s, date)};
    prompt_append(p, text, false);
}

// What flags leave of a text. Blanks are what Python's strip, and so a template's trim, takes off.
static Text prompt_trim(Text text, uint32_t flags) {
    static const wchar_t blanks[] = L"\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002"
        L"\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000";
    size_t start = 0, end = 0;
    for (size_t i = 0, used; i < text.len; i += used) {
        wchar_t c = (wchar_t)next_char(text.s + i, text.len - i, &used);
        bool blank = c && wcschr(blanks, c);
        if (start == i && (flags & TRIM_LEFT ? blank : flags & TRIM_NEWLINES && c == '\n'))
            start = i + used;
        if (!blank || !(flags & TRIM_RIGHT)) end = i + used;
    }
    return (Text){text.s ? text.s + start : NULL, end > start ? end - start : 0};
}
// What is left of the text behind a piece.
static Text prompt_text(const Tokenizer *t, int piece, Text text) {
    uint32_t flags = t->chat_flags[piece];
    text = prompt_trim(text, flags);
    for (size_t i = text.len; flags & CUT_THOUGHT && i; i--)
        if (text_ends(text.s, i, output_tags[1]))
            return prompt_trim((Text){text.s + i, text.len - i}, flags >> FROM_THOUGHT);
    return text;
}

// Appends a user's turn, and before the first one, or the last, the system's (system.s NULL: the
// model's default). Behind a reply (last: its last token; else -1) it begins with that token's
// text, as this may become one token with what follows. `after` comes behind the turn: USER_AFTER,
// or REPLY_BEFORE where it has been answered. Returns where the user's part begins.
static size_t prompt_turn(Prompt *p, const Tokenizer *t, int last, Text system, Text user,
                          int after) {
    uint32_t flags = t->chat_flags[SYSTEM_BEFORE];
    bool first = last < 0, here = flags & SYSTEM_LAST ? after == USER_AFTER : first;
    if (!first) prompt_append(p, decode(t, last, last), true), prompt_piece(p, t, ASSISTANT_AFTER);
    system = prompt_text(t, SYSTEM_BEFORE, system);
    here = here && flags & HAS_SYSTEM && system.s && (system.len || !(flags & EMPTY_IS_NONE));
    int before = here ? USER_BEFORE_SYSTEM : first ? USER_BEFORE : LATER_BEFORE;
    if (here) {
        prompt_piece(p, t, first ? SYSTEM_BEFORE : LATER_BEFORE);
        prompt_append(p, system, true);
        prompt_piece(p, t, SYSTEM_AFTER);
    } else if (first) prompt_piece(p, t, DEFAULT_SYSTEM);
    size_t start = p->n;
    prompt_piece(p, t, before);
    prompt_append(p, prompt_text(t, before, user), true);
    prompt_piece(p, t, after);
    return start;
}

// Appends a prompt's tokens. A chat's text has a BOS of its own where the template has one.
static void prompt_encode(const Prompt *p, const Tokenizer *t, bool text_start, Ids *out) {
    Tokenizer plain = *t;
    plain.h.flags &= ~(uint32_t)ADD_BOS;
    encode(&plain, (Text){p->s, p->n}, p->typed, text_start, out);
}
// How many tokens stay when the context is full: those of the first n bytes, the system turn.
static int prompt_keep(const Prompt *p, const Tokenizer *t, size_t n) {
    Ids head = {0};
    prompt_encode(&(Prompt){p->s, p->typed, n}, t, true, &head);
    free(head.ids);
    return head.n > 4 ? (int)head.n : 4;
}

// What was asked for, or else the tokenizer's file recommends, or else is usual; -1: nothing.
static float sampler_value(double asked, float recommended, float usual) {
    return asked >= 0 ? (float)asked : recommended >= 0 ? recommended : usual;
}
static Sampler sampler_new(const Options *o, const Model *m, const Tokenizer *t) {
    uint64_t now = mix64((uint64_t)time(NULL) << 32 ^ (uint64_t)(seconds() * 1e9)) | 1;  // not 0
    bool talk = o->mode && !strcmp(o->mode, "chat"), calm = talk && t->h.temperature < 0;
    TokenizerHeader h = {.temperature = -1, .top_p = -1};
    if (talk) h = t->h;
    if (h.repeat_penalty <= 0) h.repeat_penalty = calm ? 1.1f : 1;
    return (Sampler){
        .temperature = sampler_value(o->temperature, h.temperature, calm ? 0.7f : 1),
        .top_p = sampler_value(o->top_p, h.top_p, 0.9f),
        .top_k = o->top_k >= 0 ? (int)o->top_k : h.top_k > 0 ? h.top_k : 0,
        .min_p = sampler_value(o->min_p, h.min_p, 0), .dry = (float)o->dry,
        .repeat_penalty = sampler_value(o->repeat_penalty, h.repeat_penalty, 1),
        .repeat_last = (int)o->repeat_last, .rng = o->seed ? o->seed : now,
        .vocab_size = m->c.vocab_size};
}

// Writes a token's text. Of its tokens of a single byte, llama2.c prints only printable ones.
static void output_token(Output *out, const Tokenizer *t, int previous, int id) {
    Text text = decode(t, previous, id);
    uint8_t c = text.len == 1 ? (uint8_t)text.s[0] : ' ';
    if (!t->llama2c || (c >= 9 && c <= 13) || (c >= 32 && c <= 126)) output_text(out, text);
}

// -ln p(target) from logits (n): ln(sum of e^(x - max)) - (x[target] - max).
static double likelihood_of(const float *logits, int n, int target) {
    double sums[16] = {0}, sum = 0;
    float max = largest(logits, n);
    for (int i = 0; i < n; i += 16) {
        int some = n - i < 16 ? n - i : 16;
        for (int j = 0; j < some; j++) sums[j] += (double)exp_(logits[i + j] - max);
    }
    for (int j = 0; j < 16; j++) sum += sums[j];
    return log_(sum) - (double)(logits[target] - max);
}

// Writes a token as a member of a line of JSON: its text, id and log-probability.
static void output_logprob_token(Output *out, const Tokenizer *t, int previous, int id, double lp) {
    Text text = decode(t, previous, id);
    bool valid = true;
    output_print(out, "\"token\": ");
    output_json(out, text);
    for (size_t i = 0, used; i < text.len; i += used)
        valid &= next_char(text.s + i, text.len - i, &used) != 0xfffd || used > 1;
    for (size_t i = 0; i < text.len && !valid; i++)
        output_print(out, "%s%d%s", i ? ", " : ", \"bytes\": [", (uint8_t)text.s[i],
                     i + 1 < text.len ? "" : "]");
    output_print(out, ", \"id\": %d, \"logprob\": %.6f", id, lp);
}
// With --logprobs N: a line of JSON for the second of two tokens, and the N likeliest in its place.
static void output_logprob(Output *out, const Options *o, const Tokenizer *t, const float *logits,
                           int vocab, const int *ids) {
    double sum = likelihood_of(logits, vocab, ids[1]) + (double)logits[ids[1]];  // ln of e^x summed
    float *rest = resize(NULL, (size_t)vocab, sizeof(float));
    memcpy(rest, logits, (size_t)vocab * sizeof(float));
    output_print(out, "{");
    output_logprob_token(out, t, ids[0], ids[1], (double)logits[ids[1]] - sum);
    output_print(out, ", \"top\": [");
    for (int i = 0; i < o->logprobs && i < vocab; i++) {
        int best = argmax(rest, vocab);
        output_print(out, i ? ", {" : "{");
        output_logprob_token(out, t, ids[0], best, (double)logits[best] - sum);
        output_print(out, "}");
        rest[best] = -INFINITY;
    }
    output_write(out, "]}\n", 3);
    free(rest);
}

// How many slots may want logits at once, so that these stay near 16 MiB.
static int likelihood_batch(const Model *m) {
    return (int)fmax(1, fmin(MAX_BATCH, 0x1p22 / m->c.vocab_size));
}

// A text whose tokens are given: of a sequence the first `done` are computed, `end` shall be.
typedef struct {
    const Model *m;
    Cache *kv;
    int seq;
    const int *ids;
    int done, end;
    float *logits;  // of the last ones that were computed together,
    int first;      // from this one on
} Given;

// The logits of what follows ids[i], which is not before the last one that was asked for. NULL: it
// was interrupted, so that tokens before are missing.
static const float *given_logits(Given *g, int i) {
    Slot batch[MAX_BATCH];
    if (i >= g->done) {
        prefill(g->m, g->kv, g->seq, g->ids, g->done, i);
        if (interrupted) return NULL;
        int n = likelihood_batch(g->m);
        if (n > g->end - i) n = g->end - i;
        for (int j = 0; j < n; j++) batch[j] = (Slot){g->ids[i + j], i + j, g->seq, true};
        g->logits = forward(g->m, g->kv, batch, n);
        g->first = i;
        g->done = i + n;
    }
    return row_of(g->logits, i - g->first, g->m->c.vocab_size);
}
// The sum of -ln p(ids[i + 1]) for `scored` <= i < end.
static double given_likelihood(Given *g, int scored) {
    const float *logits;
    double sum = 0;
    for (int i = scored; i < g->end && (logits = given_logits(g, i)); i++)
        sum += likelihood_of(logits, g->m->c.vocab_size, g->ids[i + 1]);
    return sum;
}
// ---- [5.3] sessions -----------------------------------------------------------------------------
// A text with its keys and values in a file: `-S FILE`, chat's /save and /load. Enter at
// session_open. session_commit writes what is new to where nothing counts yet, and then, in one
// piece, the header, which says what counts; a changed text becomes a new file in the old one's
// place. Who is killed at any moment leaves the text before or after. It keeps the file open and
// locked. Calls: cache_prepare, output_send, file_replace.

#ifndef NO_SESSIONS
typedef struct {
    char magic[8];
    uint64_t model, page_bytes;   // the model's hash; the size of the cache's pages
    uint64_t rng;                 // state of the generator
    int32_t n, done, keep, thought;  // as in Context; of an unfinished page, done may not count any
    uint64_t hash;                // of all this
} SessionHeader;                  // behind it, for each page of the cache: tokens, hash, data
typedef struct {
    const char *path;  // NULL: there is none, and all calls do nothing
    int fd;
    uint8_t *image;    // memory that is written instead
    SessionHeader h;   // of the file; without a hash: the file is empty
    const Cache *kv;
} Session;
enum { SESSION_HASH = PAGE_POSITIONS * sizeof(int), SESSION_PAGE = SESSION_HASH + 8 };

static off_t session_at(const SessionHeader *h, int pos) {  // where the token of a position is
    return (off_t)sizeof *h + pos / PAGE_POSITIONS * (off_t)(SESSION_PAGE + h->page_bytes) +
           pos % PAGE_POSITIONS * (off_t)sizeof(int);
}
static SessionHeader session_header(const Cache *kv) {
    return (SessionHeader){.magic = {'s', 'e', 's', 's', 'i', 'o', 'n', '7'},
                           .model = model_hash(kv->m), .page_bytes = kv->page_bytes};
}

// Opens a file and locks it, for this program alone or for readers. Returns what is wrong, or NULL.
static const char *session_lock(const char *path, int flags, int *fd) {
    struct flock lock = {.l_type = flags & O_RDWR ? F_WRLCK : F_RDLCK, .l_whence = SEEK_SET};
    struct stat st;
    *fd = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0644);
    if (*fd < 0) return strerror(errno);
    // (A file without a name has just been replaced by another program.)
    if (fcntl(*fd, F_SETLK, &lock) || fstat(*fd, &st) || !st.st_nlink) return "it is in use";
    return S_ISREG(st.st_mode) ? NULL : "it is not a file";
}

// Reads a text into c, and its keys and values into the cache; without c it only looks whether it
// is a session of this model. Returns what is wrong, or NULL.
static const char *session_read(int fd, SessionHeader *h, Cache *kv, Context *c) {
    const SessionHeader mine = session_header(kv);
    Ids ids = {0};
    if (pread(fd, h, sizeof *h, 0) != sizeof *h || memcmp(h, "session", 7))
        return "it is not a session";
    if (memcmp(h, &mine, offsetof(SessionHeader, rng)))
        return "it is a session of another model or version: begin a new one";
    if (!c) return NULL;
    bool whole = h->hash == hash64(h, offsetof(SessionHeader, hash)) && h->done >= 0 &&
                 h->done <= h->n && h->keep >= 0;
    if (whole && (h->done > kv->ctx || h->n - 1 > kv->ctx)) return "it is longer than this context";
    for (int i = 0, id = -1; i < h->n && whole; i++) {
        whole = pread(fd, &id, sizeof id, session_at(h, i)) == sizeof id && id >= 0 &&
                id < kv->m->c.vocab_size;
        push(&ids, id);
    }
    free(whole ? c->ids.ids : ids.ids);
    if (!whole) return "it is damaged or truncated";
    *c = (Context){.ids = ids, .done = h->done, .keep = h->keep, .thought = h->thought};
    for (int i = 0; i < c->done; i += PAGE_POSITIONS) {
        cache_prepare(kv, &(Slot){.pos = i}, 1);
        uint8_t *page = *page_of(kv, 0, i);
        uint64_t hash = 0;
        ssize_t got = pread(fd, page, h->page_bytes, session_at(h, i) + SESSION_PAGE);
        bool right = pread(fd, &hash, sizeof hash, session_at(h, i) + SESSION_HASH) == sizeof hash;
        if (right && got == (ssize_t)h->page_bytes && hash == hash64(page, h->page_bytes)) continue;
        memset(page, 0, h->page_bytes);
        h->done = c->done = i;  // the rest is computed again
    }
    return NULL;
}

static void session_write(const Session *s, const void *data, size_t n, off_t at) {
    if (s->image) memcpy(s->image + at, data, n);
    else if (lseek(s->fd, at, SEEK_SET) < 0 || !output_send(s->fd, data, n))
        die("cannot write the session %s: %s", s->path, strerror(errno));
}

// Writes the tokens that the file does not have, the pages up to `done` positions that it does not
// have whole, and then the header.
static void session_append(Session *s, const Context *c, int done, uint64_t rng) {
    SessionHeader *h = &s->h;
    for (int i = h->n; i < (int)c->ids.n; i++)
        session_write(s, &c->ids.ids[i], sizeof(int), session_at(h, i));
    for (int i = h->done - h->done % PAGE_POSITIONS; i < done; i += PAGE_POSITIONS) {
        const uint8_t *page = *page_of(s->kv, 0, i);
        uint64_t hash = hash64(page, h->page_bytes);
        session_write(s, page, h->page_bytes, session_at(h, i) + SESSION_PAGE);
        session_write(s, &hash, sizeof hash, session_at(h, i) + SESSION_HASH);
    }
    h->n = (int)c->ids.n;
    h->done = done;
    h->keep = c->keep;
    h->thought = c->thought;
    h->rng = rng;
    h->hash = hash64(h, offsetof(SessionHeader, hash));
    session_write(s, h, sizeof *h, 0);
}

// Writes a new file, which takes the old one's place. Returns what is wrong, or NULL.
static const char *session_save(Session *s, const Context *c, int done, uint64_t rng) {
    s->h = session_header(s->kv);
    size_t bytes = (size_t)session_at(&s->h, (int)c->ids.n + PAGE_POSITIONS - 1);
    s->image = zeros(bytes, 1);
    session_append(s, c, done, rng);
    const char *wrong = file_replace(s->path, s->image, bytes);
    free(s->image);
    s->image = NULL;
    return wrong;
}

// The text is now c, and the file is to hold the first `done` of its keys and values.
static void session_commit(Session *s, Context *c, int done, uint64_t rng) {
    if (!s->path) return;
    if (s->h.hash && s->h.n == c->saved) session_append(s, c, done, rng);
    else {  // the file is empty, or has another text
        const char *wrong = session_save(s, c, done, rng);
        close(s->fd);
        if (!wrong) wrong = session_lock(s->path, O_RDWR, &s->fd);
        if (wrong) die("cannot write the session %s: %s", s->path, wrong);
    }
    c->saved = s->h.n;
}

// Opens the session of a text, if path is not NULL. Returns the generator's state, or 0.
static uint64_t session_open(Session *s, const char *path, Cache *kv, Context *c) {
    *s = (Session){.path = path, .kv = kv};
    if (!path) return 0;
    const char *wrong = session_lock(path, O_RDWR | O_CREAT, &s->fd);
    if (!wrong && lseek(s->fd, 0, SEEK_END)) wrong = session_read(s->fd, &s->h, kv, c);
    if (wrong) die("cannot open the session %s: %s", path, wrong);
    c->saved = (int)c->ids.n;
    return s->h.rng;
}

// Ends it with all that is computed, if the text is.
static void session_close(Session *s, Context *c, uint64_t rng) {
    if ((int)c->ids.n <= c->done + 1) session_commit(s, c, c->done, rng);
    if (s->path && (fsync(s->fd) || close(s->fd)))
        die("cannot write the session %s: %s", s->path, strerror(errno));
}
#else  // there is no option -S
typedef struct { char none; } Session;
#define session_open(session, path, kv, c) 0
#define session_commit(session, c, done, rng) (void)(session)
#define session_close(session, c, rng) (void)(session)
#endif
// ---- [5.4] tools --------------------------------------------------------------------------------
// Text that the model writes can be a question to a program: `-T CMD`. Decoders look for one after
// each token (tool_question), have it answered (tool_ask), and go on behind the answer. It keeps
// nothing but running_tool, for signals. Calls: fork, text_ends.

#ifndef NO_TOOLS
// Runs CMD with the question and a newline as its input. Returns its answer, under 4000 bytes,
// without white space at its end; or an empty one, after a word on stderr. Question and answer lie
// in files, so that no one waits for a pipe; what CMD started ends with it.
static Text tool_ask(const char *command, Text question) {
    static char answer[4000];
    FILE *in = tmpfile(), *out = tmpfile();
    bool asked = in && out && fwrite(question.s, question.len, 1, in) && fputs("\n", in) >= 0 &&
                 !fseek(in, 0, SEEK_SET);
    int status = 0;
    ssize_t n = 0;
    double end = seconds() + 2;
    sigset_t all, old;
    setenv("BC_LINE_LENGTH", "0", 1);  // bc would break long numbers
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // until running_tool can be ended
    pid_t child = running_tool = asked ? fork() : -1, ended = 0;
    if (asked) setpgid(child, child);  // here and there: what it starts ends with it
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (child == 0) {
        signal(SIGPIPE, SIG_DFL);
        if (dup2(fileno(in), 0) == 0 && dup2(fileno(out), 1) == 1)
            execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    while (child > 0 && !ended) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        ended = waitpid(child, &status, WNOHANG);
        n = pread(fileno(out), answer, sizeof answer, 0);
        if (ended || n == sizeof answer || seconds() > end || interrupted) kill(-child, SIGKILL);
    }
    running_tool = 0;
    if (in) fclose(in);
    if (out) fclose(out);
    const char *wrong = child < 0 ? "cannot be started" : n == sizeof answer ? "says too much"
                      : status && seconds() > end ? "takes too long" : status ? "fails" : NULL;
    while (n > 0 && (uint8_t)answer[n - 1] <= ' ') n--;
    if (n <= 0 && !wrong) wrong = "prints nothing";
    unfinished |= wrong && !interrupted;
    if (wrong && !interrupted)
        fprintf(stderr, "run: the tool %s %s: the model goes on alone\n", command, wrong);
    return (Text){answer, wrong || interrupted ? 0 : (size_t)n};
}

// Whether all up to "=" is arithmetic: numbers, with + - * / % ^ between them, in parentheses.
static bool tool_expression(const char *s) {
    for (int depth = 0, n_operators = 0;; n_operators++, s++) {
        while (*s == ' ' || *s == '(' || (*s == '-' && s[1] != ' ')) depth += *s++ == '(';
        size_t number = strspn(s, "0123456789.");
        if (!number) return false;
        s += number;
        while (*s == ' ' || (*s == ')' && depth)) depth -= *s++ == ')';
        if (*s == '=') return n_operators && !depth;
        if (!*s || !strchr("+-*/%^", *s)) return false;
    }
}

// The question that a text ends in, and what comes before and after the answer: an arithmetic
// expression and "=", or a <tool_call> with JSON. An empty one: none.
static Text tool_question(Text text, const char **before, const char **after) {
    static const char call[] = "<tool_call>", end[] = "</tool_call>";
    size_t n = text.len, at;
    *before = *after = "";
    if (text_ends(text.s, n, end)) {
        at = n -= strlen(end);
        while (at && !text_ends(text.s, at, call)) at--;
        *before = "\n<tool_response>\n", *after = "\n</tool_response>\n";
        return (Text){text.s + at, at ? n - at : 0};
    }
    while (n && text.s[n - 1] == ' ') n--;
    if (!n || text.s[--n] != '=') return (Text){"", 0};
    for (at = n; at && text.s[at - 1] && strchr("0123456789.+-*/%^() ", text.s[at - 1]);) at--;
    int c = at ? text.s[at - 1] : '\n';
    // It may be part of something else, as x+2*3 or 1,234*2; a line may begin with "- " or "1. ".
    bool letter = (c | 32) >= 'a' && (c | 32) <= 'z';
    bool part = text.s[at] != ' ' && (letter || strchr(",:_=", c));
    at += strspn(text.s + at, " ");
    if (c == '\n' && !tool_expression(text.s + at)) at += strcspn(text.s + at, " =");
    if (part || !tool_expression(text.s + at)) return (Text){"", 0};
    if (n + 1 == text.len && text.s[n - 1] == ' ') *before = " ";
    *after = "\n";  // or the model might add digits
    at += strspn(text.s + at, " ");
    return (Text){text.s + at, n - at};
}
#endif
// ---- [5.14] schema ------------------------------------------------------------------------------
// `--schema` and `--json`: which tokens may come next, so that the text becomes one JSON value that
// fits a JSON Schema. What may still follow is an expression; what may follow a character is its
// derivative (Brzozowski, 1964). So a token is forbidden if one of its bytes leaves nothing. Enter
// with schema_open; schema_begin a text, ask schema_mask, tell schema_take. It keeps expressions.
// Calls: next_char, decode.

#ifndef NO_SCHEMA
enum { MAX_NODES = 1 << 21, BUCKETS = 1 << 19, RECENT = 1 << 12, MAX_DEPTH = 6000,
       MAX_PATTERN = 6000, MASKS = 16, SHORT = 20, QUOTE = N_CHARS };
// Operators. Up to REPEAT they make languages of characters, a TEXT has what is to come of a scalar
// or string, a KEY of a member's name. ITEMS are an array, MEMBERS an object: b has the names seen,
// c their number, d a stage; each RULE in the union a says: of the members whose names are in its a
// there are c to d, and their values fit its b. (Names of items are numbers.) What fits a SCHEMA
// fits the schemas at all PLACEs in a union. PAST are a text's characters, DERIVED keeps results.
enum { NOTHING, EMPTY, ANYTHING, CHARS, CAT, ALT, AND, NOT, REPEAT, TEXT, KEY, SCHEMA, ITEMS,
       MEMBERS, RULE, PLACE, PAST, DERIVED };
// Before the bracket, behind it, before a member, behind one, before the bracket on a new line.
enum { OPEN, FIRST, NEXT, FILLED, LAST };
enum { UNKNOWN, BUSY, DEAD, ALIVE };  // whether any text fits
typedef struct {
    int op, a, b, c, d;
    int value, next;                  // of DERIVED: the result; the next node with the same hash
    uint8_t accepts, fate;            // whether the empty text fits; whether any
} SchemaNode;
typedef struct {                      // a value of the schema's file
    int type, at, first, next;        // its first character; its place; members; of its parent
    Text text, key;
    bool constant;                    // it stands for itself
} SchemaValue;
// Of the members of an array or object: their least and largest number, and the one from which on
// it does not matter; the names that must still come, and their number.
typedef struct { int min, max, most, missing, n_missing; } SchemaBounds;
// A character that is being read: it is `low`, or one of those that its last bits can make of it.
typedef struct { int stage, bits, low, least; } SchemaChar;
// The tokens' texts as a tree, depth first: a byte, those before it, the token that it ends or -1.
typedef struct { int byte, depth, token; } SchemaByte;
typedef struct Schema {
    const char *name;                 // for errors
    char *at, *start;                 // what is being read
    SchemaNode *nodes;
    SchemaValue *values;              // the first stands for a schema that allows all
    // Derivatives that were just asked for: of the characters from low on and below high.
    struct SchemaNext { int from, low, high, to; } recent[RECENT];
    int n_nodes, n_values, place, depth, *buckets;
    int key;                          // the string that is being read
    int opened, texts;                // nodes without those of texts; texts in progress
    int text, root, indent;           // all scalars and strings; the whole
    bool old, oldest;                 // draft 7 or before: nothing counts beside $ref; draft 4
    bool found;                       // while fates are looked for: something lives
    Ids visited, apart;               // nodes that were looked at; places, and what must not live
    SchemaByte *tree;                 // of all tokens, the special ones first
    int n_tree, n_special, longest;   // bytes of all, of those; the most of a token
    struct SchemaText *path;          // (longest + 1) a text after each byte of a token
    int masked[MASKS];                // what is left of strings, and which tokens
    uint8_t *forbidden;               // (MASKS, vocab_size) it forbids
} Schema;
typedef struct SchemaText {           // a text in progress
    Schema *s;
    int state;                        // what may follow
    SchemaChar c;
    bool string, inner;               // within a string; behind an opening bracket or comma
    int depth, gap;                   // open brackets; spaces to come
    int key;                          // the string's characters
    bool brief;                       // of escapes only those of one letter are written
} SchemaText;

// Ends the program: what is wrong with the part of the schema that is being looked at.
static __attribute__((noreturn)) void schema_refuse(const Schema *s, const char *what) {
    const SchemaValue *v = &s->values[s->place];
    Text name = v->key.len ? v->key : (Text){"it", 2};
    tell("%s: byte %d: %.*s %s", s->name, v->at, (int)name.len, name.s, what);
    exit(s->texts ? 1 : 2);
}
static void schema_deeper(Schema *s) {  // so that the stack has room for what follows
    if (++s->depth > MAX_DEPTH) schema_refuse(s, "is nested too deeply");
}
static void *schema_room(void *old, int n, size_t size) {  // for one more than n
    return n & (n - 1) ? old : resize(old, n ? 2 * (size_t)n : 1, size);
}

// ---- Expressions. Equal ones are one node.
static int *schema_bucket(const Schema *s, const SchemaNode *n) {
    return &s->buckets[hash64(n, offsetof(SchemaNode, value)) % BUCKETS];
}
static int schema_node(Schema *s, int op, int a, int b, int c, int d) {
    SchemaNode n = {op, a, b, c, d, .value = -1};
    int *bucket = schema_bucket(s, &n), id = *bucket;
    while (id && memcmp(&s->nodes[id], &n, offsetof(SchemaNode, value))) id = s->nodes[id].next;
    if (id) return id;
    if (s->n_nodes == MAX_NODES) schema_refuse(s, "needs too many states");
    s->nodes = schema_room(s->nodes, s->n_nodes, sizeof n);
    bool left = op >= CAT && op <= TEXT && s->nodes[a].accepts;
    bool right = op >= CAT && op <= AND && s->nodes[b].accepts;
    if (op == CAT || op == AND) n.accepts = left && right;
    else if (op == ALT) n.accepts = left || right;
    else if (op == REPEAT) n.accepts = left || !b;
    else n.accepts = op == EMPTY || op == ANYTHING || (op == NOT ? !left : left);
    n.next = *bucket;
    s->nodes[s->n_nodes] = n;
    return *bucket = s->n_nodes++;
}
static void schema_forget(Schema *s, int left) {  // the newest nodes
    memset(s->recent, 0, sizeof s->recent), memset(s->masked, 0, sizeof s->masked);
    for (const SchemaNode *n; s->n_nodes > left;) {
        n = &s->nodes[--s->n_nodes];
        *schema_bucket(s, n) = n->next;
    }
}
static int schema_chars(Schema *s, int low, int high) {
    return schema_node(s, CHARS, low, high, 0, 0);
}
static int schema_cat(Schema *s, int a, int b) {
    SchemaNode n = s->nodes[a];
    if (a == NOTHING || b == NOTHING) return NOTHING;
    if (a == EMPTY || b == EMPTY) return a == EMPTY ? b : a;
    if (n.op == CAT) return schema_cat(s, n.a, schema_cat(s, n.b, b));
    return schema_node(s, CAT, a, b, 0, 0);
}
static int schema_before(Schema *s, int c, int a) {  // a character, and then a
    return schema_cat(s, schema_chars(s, c, c), a);
}
static int schema_repeat(Schema *s, int a, int min, int max) {
    SchemaNode n = s->nodes[a];
    if (max <= 0 || min > max) return min > max ? NOTHING : EMPTY;
    if (a == NOTHING || a == EMPTY) return a == EMPTY || !min ? EMPTY : NOTHING;
    if (n.op == CHARS && n.b - n.a == N_CHARS - 1 && !min && max == INT_MAX) return ANYTHING;
    return min == 1 && max == 1 ? a : schema_node(s, REPEAT, a, min, max, 0);
}
static int schema_not(Schema *s, int a) {
    if (s->nodes[a].op == NOT) return s->nodes[a].a;
    return a == NOTHING ? ANYTHING : a == ANYTHING ? NOTHING : schema_node(s, NOT, a, 0, 0, 0);
}
static bool schema_single(const Schema *s, int id) {  // takes texts of one character, or none
    SchemaNode n = s->nodes[id];
    bool both = n.op == ALT || n.op == AND;
    return n.op == CHARS || (both && schema_single(s, n.a) && schema_single(s, n.b));
}
// Union or intersection: a list of operands, the newest first, none twice.
static int schema_join(Schema *s, int op, int a, int b) {
    int none = op == ALT ? NOTHING : ANYTHING, all = op == ALT ? ANYTHING : NOTHING;
    SchemaNode x = s->nodes[a], y = s->nodes[b];
    if (a == b || b == none) return a;
    if (a == none) return b;
    if (a == all || b == all) return all;
    if (op == AND && (a == EMPTY || b == EMPTY)) return x.accepts && y.accepts ? EMPTY : NOTHING;
    bool repeated = op == AND && x.op == REPEAT && y.op == REPEAT;
    if (repeated && schema_single(s, x.a) && schema_single(s, y.a))
        return schema_repeat(s, schema_join(s, AND, x.a, y.a), x.b > y.b ? x.b : y.b,
                             x.c < y.c ? x.c : y.c);
    int first_a = x.op == op ? x.a : a, rest_a = x.op == op ? x.b : none;
    int first_b = y.op == op ? y.a : b, rest_b = y.op == op ? y.b : none;
    int first = first_a > first_b ? first_a : first_b;
    int rest = schema_join(s, op, first == first_a ? rest_a : a, first == first_b ? rest_b : b);
    return rest == none ? first : rest == all ? all : schema_node(s, op, first, rest, 0, 0);
}
static int schema_either(Schema *s, int a, int b) { return schema_join(s, ALT, a, b); }
static int schema_both(Schema *s, int a, int b) { return schema_join(s, AND, a, b); }
static int schema_without(Schema *s, int a, int b) { return schema_both(s, a, schema_not(s, b)); }
static int schema_text(Schema *s, int a) {
    return a == NOTHING || a == EMPTY ? a : schema_node(s, TEXT, a, 0, 0, 0);
}
static int schema_literal(Schema *s, Text text, int end) {  // a text, and then an end
    for (size_t used; text.len;) {
        while (text.len-- > 1 && (text.s[text.len] & 0xc0) == 0x80) {}
        end = schema_before(s, (int)next_char(text.s + text.len, 4, &used), end);
    }
    return end;
}
static int schema_next(const Schema *s, int *all) {  // takes one out of a union
    SchemaNode n = s->nodes[*all];
    int one = n.op == ALT ? n.a : *all;
    *all = n.op == ALT ? n.b : NOTHING;
    return one;
}

// What is left to come after the character c.
static int schema_allowed(Schema *s, int id);
static int schema_named(Schema *s, SchemaNode key);
static int schema_derive_members(Schema *s, SchemaNode n, int id, int c);
static int schema_derive(Schema *s, int id, int c);
static int schema_oldest_first(const void *a, const void *b) { return *(int *)a - *(int *)b; }
static int schema_derive_all(Schema *s, SchemaNode n, int id, int c) {  // a union or intersection
    int op = n.op, to = op == ALT ? NOTHING : ANYTHING;
    Ids all = {0};
    for (bool more = true; more; id = n.b) {
        n = s->nodes[id];
        more = n.op == op;
        int one = schema_derive(s, more ? n.a : id, c);
        for (; s->nodes[one].op == op; one = s->nodes[one].b) push(&all, s->nodes[one].a);
        push(&all, one);
    }
    qsort(all.ids, all.n, sizeof(int), schema_oldest_first);  // each is the newest when it is added
    for (size_t i = 0; i < all.n; i++) to = schema_join(s, op, to, all.ids[i]);
    free(all.ids);
    return to;
}
static int schema_derivative(Schema *s, SchemaNode n, int id, int c) {
    int to;
    schema_deeper(s);
    if (n.op == SCHEMA) to = schema_derive(s, schema_allowed(s, id), c);
    else if (n.op >= ITEMS) to = schema_derive_members(s, n, id, c);
    else if (n.op == KEY && c == QUOTE) to = schema_named(s, n);
    else if (n.op == ALT || n.op == AND) to = schema_derive_all(s, n, id, c);
    else to = schema_derive(s, n.a, c);
    if (n.op == TEXT) to = schema_text(s, to);
    if (n.op == KEY && c != QUOTE && to) to = schema_node(s, KEY, to, n.b, 0, 0);
    if (n.op == NOT) to = schema_not(s, to);
    if (n.op == REPEAT)
        to = schema_cat(s, to, schema_repeat(s, n.a, n.b - (n.b > 0), n.c - (n.c < INT_MAX)));
    if (n.op == CAT) to = schema_cat(s, to, n.b);
    if (n.op == CAT && s->nodes[n.a].accepts) to = schema_either(s, to, schema_derive(s, n.b, c));
    s->depth--;
    return to;
}
// The first character after c that may lead elsewhere than c does.
static int schema_edge(const Schema *s, int id, int c) {
    int least = INT_MAX;
    for (bool more = true; more;) {
        SchemaNode n = s->nodes[id];
        more = n.op == ALT || n.op == AND || (n.op == CAT && s->nodes[n.a].accepts);
        int edge = n.op == CHARS ? (c < n.a ? n.a : c <= n.b ? n.b + 1 : INT_MAX)
                 : n.op >= SCHEMA ? c + 1 : n.op < CAT ? INT_MAX : schema_edge(s, n.a, c);
        if (edge < least) least = edge;
        id = n.b;
    }
    return least;
}
static int schema_derive(Schema *s, int id, int c) {
    SchemaNode n = s->nodes[id];
    if (n.op == CHARS) return n.a <= c && c <= n.b ? EMPTY : NOTHING;
    if (n.op < CAT) return id == ANYTHING && c != QUOTE ? id : NOTHING;
    if (n.op == NOT && c == QUOTE) return NOTHING;
    if (c == QUOTE) return schema_derivative(s, n, id, c);  // what follows a key depends on it
    struct SchemaNext *recent = &s->recent[(id * 31u + (unsigned)c / 16) % RECENT];
    if (recent->from == id && recent->low <= c && c < recent->high) return recent->to;
    int memo = schema_node(s, DERIVED, id, c, 0, 0), to = s->nodes[memo].value;
    if (to < 0) to = schema_derivative(s, n, id, c);
    s->nodes[memo].value = to;  // (nodes may have moved)
    int edge = schema_edge(s, id, c);
    *recent = (struct SchemaNext){id, c, edge < QUOTE ? edge : QUOTE, to};
    return to;
}
static bool schema_accepts(Schema *s, int id, int literal) {
    for (SchemaNode n; id && literal != EMPTY; literal = n.op == CAT ? n.b : EMPTY) {
        n = s->nodes[literal];
        id = schema_derive(s, id, s->nodes[n.op == CAT ? n.a : literal].a);
    }
    return s->nodes[id].accepts;
}

// Whether any text fits. What is asked for while it is being looked at, or was not found to live,
// is taken for dead; if then something is found to live, all but that is looked at again.
static bool schema_members_live(Schema *s, SchemaNode n);
static bool schema_visit(Schema *s, int id) {
    SchemaNode n = s->nodes[id];
    bool live = n.accepts || n.op == CHARS;
    if (n.fate || n.op == NOTHING) return n.fate == ALIVE;
    s->nodes[id].fate = BUSY;
    push(&s->visited, id);
    schema_deeper(s);
    if (n.op == ALT) live = schema_visit(s, n.a) || schema_visit(s, n.b);
    if (n.op == CAT) live = schema_visit(s, n.a) && schema_visit(s, n.b);
    if (n.op >= REPEAT && n.op <= KEY) live = live || schema_visit(s, n.a);
    if (n.op == SCHEMA) live = schema_visit(s, schema_allowed(s, id));
    if (n.op == ITEMS || n.op == MEMBERS) live = schema_members_live(s, n);
    if (n.op == AND || n.op == NOT)
        for (int c = 0; c <= QUOTE && !live; c = schema_edge(s, id, c))
            live = schema_visit(s, schema_derive(s, id, c));
    s->depth--;
    if (live) s->nodes[id].fate = ALIVE, s->found = true;
    return live;
}
static bool schema_alive(Schema *s, int id) {
    bool live = false, again = true;
    if (s->visited.n || s->nodes[id].fate) return schema_visit(s, id);
    while (again) {
        s->found = false;
        live = schema_visit(s, id);
        again = s->found && !live;
        while (s->visited.n) {
            SchemaNode *n = &s->nodes[s->visited.ids[--s->visited.n]];
            if (n->fate == BUSY) n->fate = live || again ? UNKNOWN : DEAD;
        }
    }
    return live;
}

// ---- Patterns: ECMA 262's regular expressions, as far as they are regular.
static const char schema_no_pattern[] = "is not a pattern that is understood";
static int schema_pattern(Schema *s, const char *pattern, bool whole);
static int schema_alternatives(Schema *s, bool search);
static int schema_class(Schema *s);
// A character, a class, a group; `within`: what a class holds.
static int schema_atom(Schema *s, bool within) {
#define RE_WHITE "\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"
    static const char names[] = "nrtfvdDwWsS.", *const meant[] = {
        "\n", "\r", "\t", "\f", "\v", "[0-9]", "[^0-9]", "[a-zA-Z0-9_]", "[^a-zA-Z0-9_]",
        "[" RE_WHITE, "[^" RE_WHITE, "[^\n\r\u2028\u2029]"};  // NOLINT: no comma is missing
    bool escaped = *s->at == '\\', special = !escaped && !within;
    char c = *(s->at += escaped);
    const char *name = c && (escaped ? c != '.' : special && c == '.') ? strchr(names, c) : NULL;
    size_t used;
    if (!c || (special && strchr("*+?^${", c)) || (escaped && !name && isalnum((uint8_t)c)))
        schema_refuse(s, schema_no_pattern);
    int all = (int)next_char(s->at, 4, &used);
    s->at += used;
    if (name) return schema_pattern(s, meant[name - names], true);
    if (special && c == '[') return schema_class(s);
    if (!special || c != '(') return schema_chars(s, all, all);
    if (!strncmp(s->at, "?:", 2)) s->at += 2;
    all = schema_alternatives(s, false);
    if (*s->at++ != ')') schema_refuse(s, schema_no_pattern);
    return all;
}
static int schema_class(Schema *s) {  // from behind its [ on
    int all = NOTHING;
    bool negated = *s->at == '^';
    for (s->at += negated; *s->at && *s->at != ']';) {
        int one = schema_atom(s, true);
        SchemaNode low = s->nodes[one], high = low;
        bool range = low.a == low.b && s->at[0] == '-' && s->at[1] && s->at[1] != ']';
        if (range) s->at++, one = schema_atom(s, true), high = s->nodes[one];
        if (range && (high.a != high.b || high.a < low.a)) schema_refuse(s, schema_no_pattern);
        all = schema_either(s, all, range ? schema_chars(s, low.a, high.a) : one);
    }
    if (!*s->at++) schema_refuse(s, schema_no_pattern);
    return negated ? schema_without(s, schema_chars(s, 0, N_CHARS - 1), all) : all;
}
// An atom, so many times.
static int schema_times(Schema *s) {
    int atom = schema_atom(s, false);
    long min = 1, max = 1;
    char c = *s->at, *end = s->at;
    if (c && strchr("*+?", c)) end++, min = c == '+', max = c == '?' ? 1 : INT_MAX;
    if (c == '{') {
        bool number = isdigit((uint8_t)end[1]);
        min = max = strtol(end + 1, &end, 10);
        if (*end == ',') max = isdigit((uint8_t)*++end) ? strtol(end, &end, 10) : INT_MAX;
        if (*end++ != '}' || !number) schema_refuse(s, schema_no_pattern);
    }
    if (max < min || min > 1 << 16) schema_refuse(s, schema_no_pattern);
    if (end > s->at && *end == '?') end++;  // lazy: it takes the same texts
    s->at = end;
    return schema_repeat(s, atom, (int)min, max < INT_MAX ? (int)max : INT_MAX);
}
// Alternatives. With `search` they may begin and end anywhere, unless anchors say otherwise.
static int schema_alternatives(Schema *s, bool search) {
    int all = NOTHING, one;
    Ids atoms = {0};
    schema_deeper(s);
    do {
        if (*s->at == '|') s->at++;
        if (search && *s->at == '^') s->at++;
        else if (search) push(&atoms, ANYTHING);
        while (*s->at && *s->at != '|' && *s->at != ')') {
            if (search && *s->at == '$' && (s->at[1] == '|' || !s->at[1])) break;
            push(&atoms, schema_times(s));
        }
        if (search && *s->at == '$') s->at++;
        else if (search) push(&atoms, ANYTHING);
        for (one = EMPTY; atoms.n; atoms.n--) one = schema_cat(s, atoms.ids[atoms.n - 1], one);
        all = schema_either(s, all, one);
    } while (*s->at == '|');
    free(atoms.ids);
    s->depth--;
    return all;
}
// The language of a pattern; `whole`: from the beginning to the end.
static int schema_pattern(Schema *s, const char *pattern, bool whole) {
    char *before = s->at;
    if (strlen(pattern) > MAX_PATTERN) schema_refuse(s, schema_no_pattern);
    s->at = (char *)(uintptr_t)pattern;
    int all = schema_alternatives(s, !whole);
    if (*s->at) schema_refuse(s, schema_no_pattern);
    s->at = before;
    return all;
}

// Numbers as they are written.
#define RE_DIGITS "-?(?:0|[1-9][0-9]*)"
#define RE_INTEGER RE_DIGITS "(?:\\.0+)?"
#define RE_PLAIN RE_DIGITS "(?:\\.[0-9]+)?"
#define RE_NUMBER RE_PLAIN "(?:[eE][+-]?[12]?[0-9]{1,2})?"

// Those above a bound, or, with `below`, under it, or equal to it: plain ones, and small ones with
// an exponent as Python writes it (from e-05 on).
static int schema_above(Schema *s, Text bound, bool below, bool equal) {
    bool minus = bound.s[0] == '-';
    int n = (int)strspn(bound.s + minus, "0123456789"), len = (int)bound.len - minus;
    char b[64];  // digits, a point, and perhaps more of them
    if (len > 40 || (int)strspn(bound.s + minus, "0123456789.") < len)
        schema_refuse(s, "is not a number of few digits");
    len = sprintf(b, "%.*s%s", len, bound.s + minus, n < len ? "" : ".");
    while (b[len - 1] == '0') len--;
    bool zero = b[0] == '0' && len == 2;
    if (!zero && !strncmp(b, "0.0000", 6)) schema_refuse(s, "is too small");
    minus = minus && !zero;
    bool strict = (below ? !equal : equal) == minus;
    int plain = schema_pattern(s, "(?:0|[1-9][0-9]*)(?:\\.[0-9]+)?", true);
    int small = schema_pattern(s, "[1-9](?:\\.[0-9]+)?e-(?:0[5-9]|[1-9][0-9])", true);
    int part = schema_pattern(s, "(?:\\.[0-9]+)?", true), any = schema_pattern(s, "[0-9]*", true);
    int all = strict ? schema_pattern(s, "[0-9]*[1-9][0-9]*", true) : any;
    int size = schema_either(s, plain, small), digit = schema_chars(s, '0', '9');
    for (int i = len, rest = any; i--;) {  // as b up to its character i, then larger, or the same
        if (i < n) rest = schema_cat(s, schema_repeat(s, digit, n - 1 - i, n - 1 - i), part);
        bool whole = i == n && len == n + 1 && !strict;  // the point can be left out
        all = schema_either(s, schema_before(s, b[i], all), whole ? EMPTY : NOTHING);
        if (i == n || b[i] == '9') continue;
        all = schema_either(s, all, schema_cat(s, schema_chars(s, b[i] + 1, '9'), rest));
    }
    int more = schema_cat(s, schema_repeat(s, digit, n, INT_MAX), part);  // digits
    all = schema_either(s, all, schema_cat(s, schema_chars(s, '1', '9'), more));
    all = schema_either(s, schema_both(s, all, plain), zero ? small : NOTHING);
    int negative = schema_without(s, size, schema_pattern(s, "0(?:\\.0+)?", true));
    if (minus) all = schema_before(s, '-', schema_without(s, negative, all));
    if (minus) all = schema_either(s, size, all);
    size = schema_either(s, size, schema_before(s, '-', negative));
    return below ? schema_without(s, size, all) : all;
}

// The formats that count.
#define RE_DAY "(?:0[1-9]|1[0-9]|2[0-8])"
#define RE_LEAP "(?:0[48]|[2468][048]|[13579][26])"
#define RE_DATE "(?:(?:[0-9]{2}" RE_LEAP "|" RE_LEAP "00)-02-29|[0-9]{4}-(?:02-" RE_DAY "|" \
    "(?:0[13578]|1[02])-(?:" RE_DAY "|29|3[01])|(?:0[469]|11)-(?:" RE_DAY "|29|30)))"
#define RE_MINUTE "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
#define RE_TIME "(?:" RE_MINUTE ":[0-5][0-9](?:\\.[0-9]+)?(?:[zZ]|[+-]" RE_MINUTE ")|" \
    "23:59:60(?:\\.[0-9]+)?[zZ])"
#define RE_LABEL "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
#define RE_HOSTNAME RE_LABEL "(?:\\." RE_LABEL ")*"
#define RE_ATOM "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
#define RE_BYTE "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
#define RE_IPV4 RE_BYTE "(?:\\." RE_BYTE "){3}"
#define RE_H "[0-9a-fA-F]{1,4}"
#define RE_TAIL "(?:" RE_H ":" RE_H "|" RE_IPV4 ")"  // of an IPv6 address: RFC 3986
#define RE_V6(left, right) \
    "|(?:(?:" RE_H ":){0," left "}" RE_H ")?::(?:" RE_H ":){" right "}" RE_TAIL
#define RE_IPV6 "(?:" RE_H ":){6}" RE_TAIL "|::(?:" RE_H ":){5}" RE_TAIL RE_V6("0", "4") \
    RE_V6("1", "3") RE_V6("2", "2") RE_V6("3", "1") RE_V6("4", "0") \
    "|(?:(?:" RE_H ":){0,5}" RE_H ")?::" RE_H "|(?:(?:" RE_H ":){0,6}" RE_H ")?::"
#define RE_NAME_CHAR "[a-zA-Z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{2}"
#define RE_PCHAR "(?:" RE_NAME_CHAR "|[:@])"
#define RE_URI "[a-zA-Z][a-zA-Z0-9+.-]*:(?://(?:(?:" RE_NAME_CHAR "|:)*@)?" \
    "(?:(?:" RE_NAME_CHAR ")*|\\[(?:" RE_IPV6 ")\\])(?::[0-9]*)?(?:/" RE_PCHAR "*)*" \
    "|/(?:" RE_PCHAR "+(?:/" RE_PCHAR "*)*)?|" RE_PCHAR "+(?:/" RE_PCHAR "*)*|)" \
    "(?:\\?(?:" RE_PCHAR "|[/?])*)?(?:#(?:" RE_PCHAR "|[/?])*)?"
static const struct { const char *name, *pattern; } schema_formats[] = {
    {"date", RE_DATE}, {"time", RE_TIME}, {"date-time", RE_DATE "[tT]" RE_TIME},
    {"uuid", "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"}, {"ipv4", RE_IPV4},
    {"ipv6", RE_IPV6}, {"hostname", RE_HOSTNAME},
    {"email", RE_ATOM "(?:\\." RE_ATOM ")*@" RE_HOSTNAME}, {"uri", RE_URI}};

// ---- JSON: the bytes of a string, the schema's values.
// Stages of a character: none, behind a backslash, within UTF-8, within hexadecimal digits, and,
// where \u has given the first of two surrogates, before \, u and d of the second.
enum { PLAIN_CHAR, ESCAPE, UTF8, HEX, SECOND };
// Takes a byte of a string: what it says of the character. False: it does not belong there.
static const char schema_meant[] = "\"\\/\b\f\n\r\t";  // what "\/bfnrt mean behind a backslash
static bool schema_byte(SchemaChar *x, int b) {
    static const char names[] = "\"\\/bfnrt";
    static const int least[] = {0, 0x80, 0x800, 0x10000};  // of two bytes of UTF-8, three, four
    const char *e = b ? strchr(names, b) : NULL;
    int more = (b >= 0xc0) + (b >= 0xe0) + (b >= 0xf0), stage = x->stage;
    if (stage == PLAIN_CHAR) {
        int low = b & (more ? 0x3f >> more : 0x7f);
        *x = (SchemaChar){more ? UTF8 : PLAIN_CHAR, 6 * more, low << 6 * more, least[more]};
        if (b == '\\') *x = (SchemaChar){ESCAPE, 21, 0, 0};
        return b >= 32 && (b < 0x80 || more) && b < 0xf8;
    }
    if (stage == ESCAPE) {
        *x = (SchemaChar){HEX, 16, 0, 0};
        if (e) *x = (SchemaChar){.low = schema_meant[e - names]};
        return e || b == 'u';
    }
    if (stage >= SECOND) {
        x->stage = stage < SECOND + 2 ? stage + 1 : HEX;
        return stage == SECOND ? b == '\\' : stage == SECOND + 1 ? b == 'u' : (b | 32) == 'd';
    }
    int bits = stage == UTF8 ? 6 : x->bits == 10 ? 2 : 4;
    int digit = b <= '9' ? b - '0' : (b | 32) - 'a' + 10;
    if (stage == HEX && !isxdigit(b)) return false;
    digit = stage == UTF8 ? b ^ 0x80 : x->bits == 10 ? digit - 12 : digit;
    if (digit < 0 || digit >> bits) return false;
    x->bits -= bits;
    x->low |= digit << x->bits;
    if (x->bits) return true;
    int half = stage == HEX ? x->low >> 10 : 0;  // of two surrogates: 0xd800 >> 10, the first
    if (half == 54) *x = (SchemaChar){SECOND, 10, 0x10000 + ((x->low & 1023) << 10), 0};
    else *x = (SchemaChar){PLAIN_CHAR, 0, x->low, x->least};
    return half == 54 || (x->low >= x->least && x->low < N_CHARS && x->low >> 11 != 27);
}
static bool schema_skip(Schema *s, char c) {  // blanks, and c if it is there
    s->at += strspn(s->at, " \t\r\n");
    bool there = c && *s->at == c;
    s->at += there;
    return there;
}
static void schema_expect(Schema *s, bool fits) {
    if (!fits) schema_refuse(s, "is no JSON");
}
static Text schema_string(Schema *s) {  // decoded in place
    SchemaChar c = {0};
    schema_expect(s, schema_skip(s, '"'));
    char *start = s->at, *end = start;
    for (; *s->at != '"' || c.stage; s->at++) {
        schema_expect(s, schema_byte(&c, (uint8_t)*s->at));
        if (!c.stage && !c.low) schema_refuse(s, "has a zero in a string");
        if (!c.stage) end += put_char(end, c.low);
    }
    s->at++;
    *end = 0;
    return (Text){start, (size_t)(end - start)};
}
static int schema_value(Schema *s, Text key) {
    schema_skip(s, 0);
    int v = s->n_values++, last = 0;
    s->values = schema_room(s->values, v, sizeof *s->values);
    char *start = s->at, type = *start;
    SchemaValue value = {.type = type, .at = (int)(start - s->start), .key = key};
    s->values[v] = value;
    s->place = v;
    schema_deeper(s);
    if (type == '"') value.text = schema_string(s);
    else if (type == '{' || type == '[') {
        for (s->at++; !schema_skip(s, type == '{' ? '}' : ']'); s->place = v) {
            schema_expect(s, !last || schema_skip(s, ','));
            Text name = type == '{' ? schema_string(s) : (Text){0};
            schema_expect(s, type == '[' || schema_skip(s, ':'));
            int child = schema_value(s, name);
            *(last ? &s->values[last].next : &value.first) = child;
            last = child;
        }
    } else {
        s->at += strspn(s->at, "+-.0123456789aeflnrstuE");
        value.text = (Text){start, (size_t)(s->at - start)};
        if (type == '-' || (type >= '0' && type <= '9')) value.type = '0';
        schema_expect(s, schema_accepts(s, s->text, schema_literal(s, value.text, EMPTY)));
    }
    s->depth--;
    s->values[v] = value;
    return v;
}
static bool text_same(Text a, Text b) { return a.len == b.len && !memcmp(a.s, b.s, a.len); }
static bool text_is(Text text, const char *name) {
    return text_same(text, (Text){name, strlen(name)});
}
static int schema_child(const Schema *s, int v, Text name) {  // the last with a name, or 0
    int found = 0;
    for (int w = s->values[v].type == '{' ? s->values[v].first : 0; w; w = s->values[w].next)
        if (text_same(s->values[w].key, name)) found = w;
    return found;
}
// The value of a keyword, whose first character is one of `types`; 0: it is not there.
static int schema_get(Schema *s, int v, const char *name, const char *types) {
    int found = schema_child(s, v, (Text){name, strlen(name)});
    s->place = found ? found : v;
    if (found && !strchr(types, s->values[found].type)) schema_refuse(s, "is malformed");
    return found;
}
static int schema_first(Schema *s, int v, const char *name, const char *types) {  // in its list
    int list = schema_get(s, v, name, types);
    return list ? s->values[list].first : 0;
}
static int schema_count(Schema *s, int v, const char *name, int none) {
    int w = schema_get(s, v, name, "0");
    double n = w ? strtod(s->values[w].text.s, NULL) : none;
    if (n < 0 || n != floor(n)) schema_refuse(s, "is malformed");
    return n < INT_MAX / 4 ? (int)n : INT_MAX;
}

// ---- Schemas. What fits one that is within another, or is a constant.
static int schema_of(Schema *s, int places) { return schema_node(s, SCHEMA, places, 0, 0, 0); }
static int schema_sub(Schema *s, int v, bool constant) {
    int type = s->values[v].type;
    s->place = v;
    s->values[v].constant |= constant;
    if (constant || type == '{') return schema_of(s, schema_node(s, PLACE, v, 0, 0, 0));
    if (type != 't' && type != 'f') schema_refuse(s, "is malformed");
    return type == 't' ? schema_of(s, 0) : NOTHING;
}
static int schema_target(Schema *s, int ref) {  // of $ref
    Text text = s->values[ref].text;
    int v = 1;
    if (*text.s != '#' || strpbrk(text.s, "~%")) schema_refuse(s, "leads out of this schema");
    for (const char *p = text.s + 1, *end = text.s + text.len; p < end;) {
        Text name = {p + 1, strcspn(p + 1, "/")};
        v = *p == '/' ? schema_child(s, v, name) : 0;
        if (!v) schema_refuse(s, "leads nowhere");
        p = name.s + name.len;
    }
    return schema_sub(s, v, false);
}

// ---- Arrays and objects: what their keywords say, or the members of a constant, as rules.
static int schema_rule(Schema *s, int rules, int names, int sub, int min, int max) {  // and others
    return schema_either(s, rules, schema_node(s, RULE, names, sub, min, max));
}
static int schema_items(Schema *s, int v) {
    bool own = s->values[v].constant;
    int items = own ? 0 : schema_get(s, v, "items", "tf{["), n = 0, rules = NOTHING;
    int w = own ? s->values[v].first : s->old ? 0 : schema_first(s, v, "prefixItems", "[");
    if (items && s->values[items].type == '[') {
        w = s->values[items].first;
        items = schema_get(s, v, "additionalItems", "tf{");
    }
    for (; w; w = s->values[w].next, n++)
        rules = schema_rule(s, rules, schema_chars(s, n, n), schema_sub(s, w, own), 0, 1);
    int rest = schema_chars(s, n, INT_MAX);
    if (items) rules = schema_rule(s, rules, rest, schema_sub(s, items, false), 0, INT_MAX);
    int min = own ? n : schema_count(s, v, "minItems", 0);
    int max = own ? n : schema_count(s, v, "maxItems", INT_MAX);
    return schema_rule(s, rules, ANYTHING, schema_of(s, 0), min, max);
}
static int schema_members(Schema *s, int v) {
    bool own = s->values[v].constant;
    int others = ANYTHING, other = 0, rules = NOTHING, names, w = own ? v : 0;
    if (!own) w = schema_get(s, v, "properties", "{");
    for (w = w ? s->values[w].first : 0; w; w = s->values[w].next) {
        names = schema_literal(s, s->values[w].key, EMPTY);
        others = schema_without(s, others, names);
        rules = schema_rule(s, rules, names, schema_sub(s, w, own), own, 1);
    }
    if (own) return schema_rule(s, rules, others, NOTHING, 0, INT_MAX);
    for (w = schema_first(s, v, "patternProperties", "{"); w; w = s->values[w].next) {
        s->place = w;
        names = schema_pattern(s, s->values[w].key.s, false);
        others = schema_without(s, others, names);
        rules = schema_rule(s, rules, names, schema_sub(s, w, false), 0, INT_MAX);
    }
    other = schema_get(s, v, "additionalProperties", "tf{");
    if (other) rules = schema_rule(s, rules, others, schema_sub(s, other, false), 0, INT_MAX);
    for (w = schema_first(s, v, "required", "[tf"); w; w = s->values[w].next) {
        if (s->values[w].type != '"') schema_refuse(s, "is malformed");
        names = schema_literal(s, s->values[w].text, EMPTY);
        rules = schema_rule(s, rules, names, schema_of(s, 0), 1, 1);
    }
    int min = schema_count(s, v, "minProperties", 0);
    int max = schema_count(s, v, "maxProperties", INT_MAX);
    return schema_rule(s, rules, ANYTHING, schema_of(s, 0), min, max);
}
static SchemaBounds schema_bounds(Schema *s, SchemaNode n) {
    SchemaBounds b = {0, INT_MAX, 0, NOTHING, 0};
    while (n.a) {
        SchemaNode r = s->nodes[schema_next(s, &n.a)];
        int name = n.op == ITEMS ? s->nodes[r.a].a + 1 : 0, missing = b.missing;
        int most = r.a != ANYTHING ? name : r.d < INT_MAX ? r.d : r.c;
        if (most > b.most) b.most = most;
        if (r.a == ANYTHING && r.c > b.min) b.min = r.c;
        if (r.a == ANYTHING && r.d < b.max) b.max = r.d;
        if (r.c && r.a != ANYTHING && !schema_accepts(s, n.b, r.a))
            b.missing = schema_either(s, missing, r.a);
        b.n_missing += b.missing != missing;
    }
    return b;
}
// What all rules allow as the value of a member.
static int schema_member(Schema *s, int rules, int name) {
    int all = NOTHING;
    while (rules) {
        SchemaNode r = s->nodes[schema_next(s, &rules)];
        bool one = r.d == 1 && r.a != ANYTHING;  // the rule is for a single name
        bool counts = one ? r.a == name : schema_accepts(s, r.a, name);
        if (counts && r.b == NOTHING) return NOTHING;
        if (counts) all = schema_either(s, all, s->nodes[r.b].a);
    }
    return schema_of(s, all);
}
// The names that the next member of an object can have.
static int schema_names(Schema *s, SchemaNode n, SchemaBounds b) {
    bool sure = !s->visited.n;  // else what is found may depend on what is not known yet
    int memo = schema_node(s, DERIVED, n.a, sure ? -2 : -3, 0, 0), all = s->nodes[memo].value;
    if (b.max - n.c <= b.n_missing) return b.missing;
    if (all < 0) {
        all = ANYTHING;
        for (int rules = n.a; rules;) {
            SchemaNode r = s->nodes[schema_next(s, &rules)];
            bool one = r.d == 1 && r.a != ANYTHING;
            if (!schema_alive(s, one ? schema_member(s, n.a, r.a) : r.b))
                all = schema_without(s, all, r.a);
        }
        if (sure) s->nodes[memo].value = all;
    }
    return schema_without(s, all, n.b);
}
static bool schema_members_live(Schema *s, SchemaNode n) {
    SchemaBounds b = schema_bounds(s, n);
    bool more = n.d == NEXT || n.c < b.min, live = b.min <= b.max && b.n_missing <= b.max - n.c;
    int end = n.c + 1 < b.min ? b.min : n.c + 1;
    if (n.d == LAST) return live && !more && !b.n_missing;
    if (more) live = live && n.c < b.max;
    if (more && n.op == MEMBERS) live = live && schema_visit(s, schema_names(s, n, b));
    for (int i = n.c; more && n.op == ITEMS && live && i < end && i <= b.most; i++)
        live = schema_visit(s, schema_member(s, n.a, schema_chars(s, i, i)));
    while (live && b.missing)
        live = schema_visit(s, schema_member(s, n.a, schema_next(s, &b.missing)));
    return live;
}
static int schema_filled(Schema *s, SchemaNode n, int seen) {  // with one more member
    int most = schema_bounds(s, n).most;
    return schema_node(s, n.op, n.a, seen, n.c < most ? n.c + 1 : most, FILLED);
}
// What is left of an array or object after the character c.
static int schema_derive_members(Schema *s, SchemaNode n, int id, int c) {
    SchemaBounds b = schema_bounds(s, n);
    bool array = n.op == ITEMS, lines = s->indent;
    int to = OPEN;
    if (n.d != OPEN && c == (array ? ']' : '}')) {
        bool end = n.d == FIRST || n.d == (lines ? LAST : FILLED);
        return end && n.c >= b.min && !b.n_missing ? EMPTY : NOTHING;
    }
    if (n.d == NEXT || (n.d == FIRST && !lines)) {
        if (n.c >= b.max || !(array || c == QUOTE)) return NOTHING;
        if (!array) return schema_node(s, KEY, schema_names(s, n, b), id, 0, 0);
        int item = schema_member(s, n.a, schema_chars(s, n.c, n.c));
        return schema_derive(s, schema_cat(s, item, schema_filled(s, n, NOTHING)), c);
    }
    if (n.d == OPEN && c == (array ? '[' : '{')) to = FIRST;
    if (n.d == FIRST && c == '\n') to = NEXT;
    if (n.d == FILLED && c == '\n' && lines) to = LAST;
    if (n.d == FILLED && c == ',') to = NEXT;
    int next = schema_node(s, n.op, n.a, n.b, n.c, to);
    if (c == ',') next = schema_before(s, lines ? '\n' : ' ', next);
    return to ? next : NOTHING;
}
static int schema_named(Schema *s, SchemaNode key) {  // what follows the name of a member
    SchemaNode n = s->nodes[key.b];
    int name = EMPTY;
    for (int i = s->key; i; i = s->nodes[i].b) name = schema_before(s, s->nodes[i].a, name);
    int value = s->nodes[key.a].accepts ? schema_member(s, n.a, name) : NOTHING;
    if (value == NOTHING) return NOTHING;
    int rest = schema_cat(s, value, schema_filled(s, n, schema_either(s, n.b, name)));
    return schema_before(s, ':', schema_before(s, ' ', rest));
}

// ---- Values: a union of a TEXT, ITEMS and MEMBERS. What two such both allow.
static int schema_inside(Schema *s, int op, int v) {  // the ITEMS or MEMBERS that a schema allows
    int list = op == ITEMS ? schema_items(s, v) : schema_members(s, v);
    return schema_node(s, op, list, NOTHING, 0, OPEN);
}
static int schema_meet(Schema *s, int x, int y) {
    SchemaNode a = s->nodes[x], b = s->nodes[y];
    if (a.op == ALT) return schema_either(s, schema_meet(s, a.a, y), schema_meet(s, a.b, y));
    if (b.op == ALT) return schema_meet(s, y, x);
    if (a.op != b.op || x == NOTHING) return NOTHING;
    if (a.op != TEXT) return schema_node(s, a.op, schema_either(s, a.a, b.a), NOTHING, 0, OPEN);
    if (a.a == s->text || b.a == s->text) return a.a == s->text ? y : x;
    return schema_text(s, schema_both(s, a.a, b.a));
}
static int schema_quoted(Schema *s, int content) {
    return schema_before(s, QUOTE, schema_cat(s, content, schema_chars(s, QUOTE, QUOTE)));
}
static int schema_number(Schema *s, int v, bool integer) {
    static const char *const names[] = {"minimum", "maximum", "exclusiveMinimum",
                                        "exclusiveMaximum"};
    int all = schema_pattern(s, !integer ? RE_NUMBER : s->oldest ? RE_DIGITS : RE_INTEGER, true);
    for (int i = 0; i < 4; i++) {
        int strict = i < 2 ? schema_get(s, v, names[i + 2], "0tf") : 0;
        int w = schema_get(s, v, names[i], i < 2 ? "0" : "0tf");
        bool equal = i < 2 && !(strict && s->values[strict].type == 't');
        if (w && s->values[w].type == '0')
            all = schema_both(s, all, schema_above(s, s->values[w].text, i & 1, equal));
    }
    return all;
}
static int schema_string_text(Schema *s, int v) {
    int min = schema_count(s, v, "minLength", 0), max = schema_count(s, v, "maxLength", INT_MAX);
    int all = schema_repeat(s, schema_chars(s, 0, N_CHARS - 1), min, max);
    int w = schema_get(s, v, "pattern", "\"");
    if (w) all = schema_both(s, all, schema_pattern(s, s->values[w].text.s, false));
    w = schema_get(s, v, "format", "\"");
    for (size_t i = 0; w && i < sizeof schema_formats / sizeof *schema_formats; i++)
        if (text_is(s->values[w].text, schema_formats[i].name))
            all = schema_both(s, all, schema_pattern(s, schema_formats[i].pattern, true));
    return schema_quoted(s, all);
}
// What fits a constant, or one of several values from v on.
static int schema_constants(Schema *s, int v, bool several) {
    int text = NOTHING, all = NOTHING;
    for (; v; v = several ? s->values[v].next : 0) {
        Text value = s->values[v].text;
        int type = s->values[v].type, one = NOTHING;
        s->place = v;
        s->values[v].constant = true;
        if (type == '"')
            one = schema_before(s, QUOTE, schema_literal(s, value, schema_chars(s, QUOTE, QUOTE)));
        else if (type == '0')
            one = schema_both(s, schema_above(s, value, false, true),
                              schema_above(s, value, true, true));
        else if (type == '[' || type == '{')
            all = schema_either(s, all, schema_inside(s, type == '[' ? ITEMS : MEMBERS, v));
        else one = schema_literal(s, value, EMPTY);
        text = schema_either(s, text, one);
    }
    return schema_either(s, all, schema_text(s, text));
}
// What the keywords of a schema say of its own type and value.
static int schema_typed(Schema *s, int v) {
    static const char types[][8] = {"null", "boolean", "integer", "number", "string", "array",
                                    "object"};
    int type = schema_get(s, v, "type", "\"["), set = type ? 0 : 127, text = NOTHING;
    bool list = type && s->values[type].type == '[';
    for (int w = list ? s->values[type].first : type; w; w = list ? s->values[w].next : 0) {
        int i = 0;
        while (i < 7 && !text_is(s->values[w].text, types[i])) i++;
        if (i == 7) schema_refuse(s, "is malformed");
        set |= 1 << i;
    }
    if (set & 1) text = schema_pattern(s, "null", true);
    if (set & 2) text = schema_either(s, text, schema_pattern(s, "true|false", true));
    if (set & 12) text = schema_either(s, text, schema_number(s, v, !(set & 8)));
    if (set & 16) text = schema_either(s, text, schema_string_text(s, v));
    int all = schema_text(s, text);
    if (set & 32) all = schema_either(s, all, schema_inside(s, ITEMS, v));
    if (set & 64) all = schema_either(s, all, schema_inside(s, MEMBERS, v));
    int values = schema_get(s, v, "enum", "["), constant = schema_get(s, v, "const", "\"0tfn[{");
    if (values) all = schema_meet(s, all, schema_constants(s, s->values[values].first, true));
    return constant ? schema_meet(s, all, schema_constants(s, constant, false)) : all;
}
static int schema_keywords(Schema *s, int v) {
    static const char *const lists[] = {"allOf", "anyOf", "oneOf"};
    static const char *const refused[] = {
        "uniqueItems", "dependencies", "dependentRequired", "dependentSchemas", "contains", "not",
        "minContains", "maxContains", "if", "multipleOf", "divisibleBy", "propertyNames",
        "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "disallow",
        "extends"};
    if (s->values[v].constant) return schema_constants(s, v, false);
    int ref = schema_get(s, v, "$ref", "\""), all = 0;
    if (ref) all = schema_allowed(s, schema_target(s, ref));
    if (ref && s->old) return all;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        int w = schema_get(s, v, refused[i], "\"0tfn[{");
        if (w && (i || s->values[w].type != 'f'))
            schema_refuse(s, "is a keyword that is not understood here");
    }
    all = ref ? schema_meet(s, all, schema_typed(s, v)) : schema_typed(s, v);
    for (int i = 0; i < 3; i++) {
        int list = schema_get(s, v, lists[i], "["), some = NOTHING;
        if (list && !s->values[list].first) schema_refuse(s, "is malformed");
        for (int w = list ? s->values[list].first : 0; w; w = s->values[w].next) {
            int one = schema_allowed(s, schema_sub(s, w, false));
            if (i == 0) all = schema_meet(s, all, one);
            if (i == 2) push(&s->apart, list), push(&s->apart, schema_meet(s, some, one));
            some = schema_either(s, some, one);
        }
        if (i && list) all = schema_meet(s, all, some);
    }
    return all;
}
// What all schemas of a SCHEMA allow.
static int schema_allowed(Schema *s, int id) {
    int memo = schema_node(s, DERIVED, id, -1, 0, 0), all = s->nodes[memo].value;
    if (id == NOTHING || all >= 0) return id == NOTHING ? id : all;
    if (all == -2) schema_refuse(s, "refers to itself");
    s->nodes[memo].value = -2;
    schema_deeper(s);
    int rest = s->nodes[id].a, first = schema_next(s, &rest);
    if (!rest) all = schema_keywords(s, s->nodes[first].a);
    else all = schema_meet(s, schema_allowed(s, schema_of(s, rest)),
                           schema_allowed(s, schema_of(s, first)));
    s->depth--;
    return s->nodes[memo].value = all;
}

// ---- A text in progress. Whether a character from low to high may come next.
static bool schema_some(Schema *s, int state, int low, int high) {
    bool fits = false;
    for (int c = low; c <= high && !fits; c = schema_edge(s, state, c))
        fits = schema_alive(s, schema_derive(s, state, c));
    return fits;
}
static bool schema_in_key(const Schema *s, int id) {  // all that may follow is, or nothing
    while (s->nodes[id].op == ALT || s->nodes[id].op == CAT) id = s->nodes[id].a;
    return s->nodes[id].op == KEY;
}
// Takes the next byte of the text. False: no text that fits goes on so.
static bool schema_step(SchemaText *x, uint8_t byte) {
    Schema *s = x->s;
    SchemaChar *c = &x->c;
    bool quote = byte == '"' && !c->stage, within = x->string && !quote;
    if (x->gap) {
        x->gap--;
        return byte == ' ';
    }
    if (!x->string) {  // the lines that --indent wants
        bool open = byte == '[' || byte == '{', close = byte == ']' || byte == '}';
        if (byte == '\n') x->gap = s->indent * (x->depth - !x->inner);
        x->depth += open - close;
        x->inner = open || byte == ',';
        x->key = 0;
    }
    x->string ^= quote;
    s->key = x->key;
    if (!within) c->low = quote ? QUOTE : byte;
    else if (!schema_byte(c, byte)) return false;
    if (within && !c->stage && schema_in_key(s, x->state))
        x->key = schema_node(s, PAST, c->low, x->key, 0, 0);
    if (!c->stage) return schema_alive(s, x->state = schema_derive(s, x->state, c->low));
    bool fits = false;
    for (const char *e = schema_meant; c->stage == ESCAPE && *e && !fits; e++)
        fits = schema_some(s, x->state, *e, *e);
    if (fits || (x->brief && (c->stage == ESCAPE || c->stage == HEX))) return fits;
    int low = c->low > c->least ? c->low : c->least, high = c->low + (1 << c->bits) - 1;
    if (high >= N_CHARS) high = N_CHARS - 1;
    if (schema_some(s, x->state, low, high < 0xd7ff ? high : 0xd7ff)) return true;
    if (schema_some(s, x->state, low > 0xe000 ? low : 0xe000, high)) return true;
    if (low < 0xd800) low = 0xd800;  // of the first of two surrogates
    if (high > 0xdbff) high = 0xdbff;
    low = 0x10000 + (low - 0xd800) * 1024, high = 0x103ff + (high - 0xd800) * 1024;
    return c->stage == HEX && schema_some(s, x->state, low, high);
}
static bool schema_complete(const SchemaText *x) { return x->s->nodes[x->state].accepts; }
// Takes the text of a token that was drawn. True: the text ends here.
static bool schema_take(SchemaText *x, Text text) {
    for (size_t i = 0; i < text.len; i++)
        if (!schema_step(x, (uint8_t)text.s[i])) return true;
    return schema_complete(x) && !schema_some(x->s, x->state, 0, N_CHARS - 1);
}
static SchemaText schema_begin(Schema *s) {
    if (s) s->texts++;
    return (SchemaText){.s = s, .state = s ? s->root : NOTHING};
}
// Many nodes are forgotten when no text is in progress: that is worth waiting for.
static bool schema_full(const Schema *s) { return s && s->texts && s->n_nodes > MAX_NODES / 4; }
// Ends a text. False: it is not complete.
static bool schema_end(SchemaText *x) {
    Schema *s = x->s;
    bool whole = !s || schema_complete(x);
    if (s && schema_full(s) && s->texts == 1) {
        schema_forget(s, s->opened);
        for (int i = 0; i < s->opened; i++)
            if (s->nodes[i].value >= s->opened) s->nodes[i].value = -1;
    }
    if (s) s->texts--;
    x->s = NULL;
    return whole;
}
// Ends the program if a document does not fit. (A line break may follow it.)
static void schema_check(Schema *s, Text text, const char *name) {
    SchemaText x = schema_begin(s);
    size_t n = 0, end = text.len - (text.len && text.s[text.len - 1] == '\n');
    while (n < end && schema_step(&x, (uint8_t)text.s[n])) n++;
    if (n < end || !schema_complete(&x))
        die("%s does not fit %s: byte %zu %s", name, s->name, n,
            n < end ? "goes wrong" : "is missing: it is not complete");
}

// Reads and prepares the schema of --schema or --json.
static Schema *schema_open(const Options *o) {
    Schema *s = zeros(1, sizeof *s);
    bool here = o->json || o->schema[0] == '{';
    Text text = {o->json ? "true" : o->schema, 0};
    text.len = strlen(text.s);
    if (!here) text = input_read(o->schema, NULL, true);
    s->name = o->json ? "--json" : here ? "the schema" : o->schema;
    s->indent = (int)o->indent;
    s->buckets = zeros(BUCKETS, sizeof *s->buckets);
    s->values = resize(NULL, 1, sizeof *s->values);
    s->values[s->n_values++] = (SchemaValue){.type = 't'};
    for (int op = 0; op < CHARS; op++) schema_node(s, op, 0, 0, 0, 0);
    s->text = schema_either(s, schema_pattern(s, RE_NUMBER "|null|true|false", true),
                            schema_quoted(s, ANYTHING));
    s->at = s->start = memcpy(resize(NULL, text.len + 1, 1), text.s, text.len);
    s->start[text.len] = 0;
    if (!here) free((char *)(uintptr_t)text.s);
    schema_value(s, (Text){0});
    schema_skip(s, 0);
    s->place = 1;
    if (s->at != s->start + text.len) schema_refuse(s, "is no JSON: something follows");
    int draft = schema_get(s, 1, "$schema", "\"");
    s->old = draft && strstr(s->values[draft].text.s, "/draft-0");
    s->oldest = s->old && strstr(s->values[draft].text.s, "/draft-04");  // 1.0 is no integer
    s->root = schema_sub(s, 1, false);
    for (int i = 0; i < s->n_nodes; i++)
        if (s->nodes[i].op == SCHEMA) schema_allowed(s, i);
    for (size_t i = 0; i < s->apart.n; i += 2) {
        s->place = s->apart.ids[i];
        if (schema_alive(s, s->apart.ids[i + 1])) schema_refuse(s, "has alternatives that overlap");
    }
    s->place = 1;
    if (!schema_alive(s, s->root)) schema_refuse(s, "cannot be met by anything");
    s->opened = s->n_nodes;
    return s;
}
static void schema_close(Schema *s) {
    void *memory[] = {s->nodes, s->buckets, s->values, s->start, s->visited.ids, s->apart.ids,
                      s->tree, s->forbidden, s->path, s};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
}

// ---- Masks. What may come next of all tokens.
// Within a string, what a token needs of it is the same for many states, unless it is special: it
// has a quote, so that it can end the string, or is long, so that it may exceed the string's.
static bool schema_special(Text x) { return x.len > SHORT || memchr(x.s, '"', x.len); }
static int schema_by_text(const void *a, const void *b) {
    Text x = ((const Token *)a)->text, y = ((const Token *)b)->text;
    int order = schema_special(y) - schema_special(x);
    if (!order) order = memcmp(x.s, y.s, x.len < y.len ? x.len : y.len);
    return order ? order : (x.len > y.len) - (x.len < y.len);
}
static void schema_tree(Schema *s, const Tokenizer *t) {
    int n = t->h.vocab_size;
    Token *tokens = zeros((size_t)n, sizeof *tokens);  // sorted by text; type: the id
    s->forbidden = zeros((size_t)n, MASKS);
    for (int id = 0; id < n; id++) {
        Text text = is_stop(t, id) ? (Text){"", 0} : decode(t, -1, id);
        if (t->llama2c && text.len == 1 && (uint8_t)text.s[0] > 126) text.len = 0;
        if ((int)text.len > s->longest) s->longest = (int)text.len;
        tokens[id] = (Token){text, 0, id};
    }
    s->path = zeros((size_t)s->longest + 1, sizeof *s->path);
    int *at = zeros((size_t)s->longest + 1, sizeof *at);  // where the bytes of a text are
    qsort(tokens, (size_t)n, sizeof *tokens, schema_by_text);
    for (int k = 0; k < n; k++) {
        Text x = tokens[k].text, before = k ? tokens[k - 1].text : (Text){"", 0};
        size_t i = 0;
        while (i < before.len && i + 1 < x.len && x.s[i] == before.s[i]) i++;
        for (; i < x.len; i++) {
            s->tree = schema_room(s->tree, s->n_tree, sizeof *s->tree);
            s->tree[at[i] = s->n_tree++] = (SchemaByte){(uint8_t)x.s[i], (int)i,
                                                        i + 1 < x.len ? -1 : tokens[k].type};
        }
        if (schema_special(x)) s->n_special = s->n_tree;
    }
    free(tokens), free(at);
}
// A string's rest, but for counts that no short token reaches.
static int schema_uncounted(Schema *s, int id) {
    SchemaNode n = s->nodes[id];
    if (n.op == CAT) return schema_cat(s, schema_uncounted(s, n.a), n.b);
    if (n.op != REPEAT || !schema_single(s, n.a) || n.c < SHORT) return id;
    return schema_repeat(s, n.a, n.b < SHORT ? n.b : SHORT, INT_MAX);
}
// The rest of the string in a state: all that a token depends on that is not special.
static int schema_left(Schema *s, int id) {
    SchemaNode n = s->nodes[id];
    int rest = n.op == KEY ? schema_cat(s, n.a, schema_chars(s, QUOTE, QUOTE)) : n.a;
    if (n.op == ALT) return schema_either(s, schema_left(s, n.a), schema_left(s, n.b));
    if (n.op == CAT) return schema_alive(s, n.b) ? schema_left(s, n.a) : NOTHING;
    return n.op < TEXT ? id : schema_text(s, schema_uncounted(s, rest));
}
// The tokens that cannot come next; NULL: none can.
static const uint8_t *schema_mask(SchemaText *x, const Tokenizer *t) {
    Schema *s = x->s;
    if (!s->tree) schema_tree(s, t);
    int vocab = t->h.vocab_size, old = s->n_nodes, allowed = 0, known = 0;
    int left = x->string && !x->c.stage ? schema_left(s, x->state) : 0;
    int *masked = &s->masked[left % MASKS];
    uint8_t *forbidden = s->forbidden + (size_t)(left % MASKS) * (size_t)vocab;
    bool kept = left && *masked == left;  // what it forbids, but for the special tokens
    x->brief = true;
    s->path[0] = *x;
    for (int id = 0; id < vocab && !kept; id++)
        forbidden[id] = !(is_stop(t, id) && schema_complete(x));
    const SchemaByte *b = s->tree, *behind = b + s->n_special, *end = b + s->n_tree;
    for (; b < (kept ? behind : end); b++) {
        if (b->token >= 0) forbidden[b->token] = true;
        if (b->depth > known) continue;  // a byte before it cannot come
        if (b == behind && left) s->path[0].state = left;
        SchemaText *after = &s->path[b->depth + 1];
        *after = after[-1];
        known = b->depth + schema_step(after, (uint8_t)b->byte);
        if (b->token >= 0) forbidden[b->token] = known == b->depth;
    }
    for (int id = 0; id < vocab; id++) allowed += !forbidden[id];
    *masked = left;
    if (s->n_nodes > MAX_NODES / 2) schema_forget(s, old);
    return allowed ? forbidden : NULL;
}
#else
typedef struct { char none; } SchemaText;
#define schema_mask(x, t) NULL
#define schema_take(x, text) false
#define schema_begin(s) (SchemaText){0}
#define schema_end(x) true
#define schema_full(s) false
#define schema_check(s, text, name) (void)0
#define schema_close(s) (void)0
#endif
// ---- [5.5] decoders, samples, speculation -------------------------------------------------------
// Texts that grow, token by token: with -k several at once, with -d several tokens at once. Enter
// with machine_open, give the decoder a text and a budget, then decoder_continue. A Machine keeps
// what decoders share; its first decoder's text is the session's. Calls: forward, sample.

enum { MAX_SAMPLES = 256, MAX_DRAFT = 15 };  // texts; guesses at the next tokens of one
enum { LONG_PROMPT = 1000 };  // while more tokens are read, a terminal is told

// A text in progress: its tokens, its place in the cache, its sampler.
typedef struct {
    Context c;
    int seq;                // its sequence in the cache; 0 may be a session's
    Sampler s;
    int first;              // of the logits that its next tokens are drawn from
    long long budget;       // tokens that it may still draw; 0 after one that ends the text
    int n_new;              // tokens that it drew
    long long line;         // of --each: 1, 2, ...; 0: it has none
    double score;           // with -k: the sum of their log-probabilities; at the end their mean,
                            // or the reward of the text
    unsigned long long seed, receipt;  // the generator's state at the start; hash of the logits
    SchemaText schema;      // its text, if it must fit one
    Output *out;            // where the text goes
    Output own;             // in memory: with -k it goes there
} Decoder;

typedef struct {            // what guesses, and how it pays
    Model small;            // its layers are NULL: guesses are looked up in the text so far
    Cache kv;               // or only its ctx: where guesses end
    Ids text;               // the decoder's n tokens when guesses were last made, and the guesses
    int n, done;            // of the text, the cache holds the first `done`
    int guesses;            // how many are made next
    int proposed;           // how many were made
} Draft;

// Another model, which answers too, or judges answers.
typedef struct { Model m; Tokenizer t; Output answer; } Member;

typedef struct {
    const Options *o;
    const Model *m;
    const Tokenizer *t;
    int ctx;
    Output *out;
    Cache kv;
    Session session;
    Draft draft;
    Member judge;           // of --reward; its layers are NULL: there is none
    Text question;          // what the last answers answer; s NULL: that is not known any more
    float *p;               // (threads, vocab_size) scratch of the samplers
    Candidate *candidates;  // (threads, vocab_size)
    Decoder *all;           // that run,
    const float *logits;    // and those of their next tokens
    bool shifted;           // the context was full
    int steps;              // batches that were computed,
    double first_logits;    // and when the first one was
    Ids turns;              // of a chat, that can be taken back: their start, the token before it
    const char *system;     // of a chat: the text of its system turn, or NULL
    bool told;              // in this turn of a chat a tool had one of its own
    double rate;            // tokens per second of the last one
} Machine;

static void member_open(Member *e, const char *path) {
    *e = (Member){.answer = {.fd = -1}};
    load_model(&e->m, path);
    find_tokenizer(&e->t, NULL, &e->m);
}
static void member_close(Member *e) {
    free(e->answer.memory);
    free_tokenizer(&e->t), free_model(&e->m);
}

// A reward model is trained to tell which answer people like better: it has, in place of the
// classifier, one row, whose product with the last token's final x is the reward.
static void reward_open(const Options *o, Member *judge) {
    member_open(judge, o->reward);
    if (!judge->m.score.data) die("%s is no reward model: it has no row for a score", o->reward);
}
static double reward_of_ids(const Model *m, const int *ids, int n) {
    Cache kv;
    cache_open(&kv, m, n, 1);
    prefill(m, &kv, 0, ids, 0, n);
    double reward = interrupted ? -INFINITY : (double)sum16(kv.state.xb, vec(&m->score), m->c.dim);
    cache_close(&kv);
    return reward;
}
// The reward of an answer, in the reward model's own chat format, if it has one.
static double reward_of(const Member *judge, Text question, Text answer) {
    const Tokenizer *t = &judge->t;
    Prompt p = {0};
    Ids ids = {0};
    bool chat = t->chat[USER_BEFORE].len || t->chat[USER_AFTER].len;
    if (chat) prompt_turn(&p, t, -1, (Text){NULL, 0}, question, REPLY_BEFORE);
    else prompt_append(&p, question, true);
    prompt_append(&p, answer, true);
    if (chat) prompt_piece(&p, t, ASSISTANT_AFTER);
    if (chat) prompt_encode(&p, t, true, &ids);
    else encode(t, (Text){p.s, p.n}, NULL, true, &ids);
    int n = (int)ids.n, most = judge->m.c.seq_len, start = n > most ? n - most : 0;
    double reward = n ? reward_of_ids(&judge->m, ids.ids + start, n - start) : 0;  // of the newest
    prompt_free(&p);
    free(ids.ids);
    return reward;
}

static void decoder_commit(Machine *w, Decoder *d) {
    if (d->seq == 0)  // with whole pages only: an unfinished one is written at the end
        session_commit(&w->session, &d->c, d->c.done / PAGE_POSITIONS * PAGE_POSITIONS, d->s.rng);
}

// Leaves the first `keep` tokens and the newest ones; these, in new places, are computed again.
static void decoder_cut(Machine *w, Decoder *d, int keep, int newest) {
    Context *c = &d->c;
    int *ids = c->ids.ids, n = (int)c->ids.n;
    for (int i = 0; i < newest; i++) ids[keep + i] = ids[n - newest + i];  // NOLINT: there are n
    c->ids.n = (size_t)(keep + newest);
    if (c->done > keep) c->done = keep;
    if (c->saved > keep) c->saved = keep;
    decoder_commit(w, d);
}

// Computes all tokens but the last `but`, so that text and cache can be kept. Of a text that has
// filled the context the beginning and the newest half stay, what is between them is dropped.
static void decoder_settle(Machine *w, Decoder *d, int but) {
    if ((int)d->c.ids.n > w->ctx) {
        int most = (w->ctx - 1) / 2, keep = d->c.keep < most ? d->c.keep : most;
        decoder_cut(w, d, keep, w->ctx > 1 ? w->ctx / 2 : 1);
        w->turns.n = 0;
        if (!w->shifted && !w->o->quiet)
            fputs("\n(the context is full: its beginning and its newest half stay)\n", stderr);
        w->shifted = true;
    }
    int end = (int)d->c.ids.n - but, n = end - d->c.done;
    double began = seconds();
    for (int at = d->c.done, to; at < end; at = to) {
        to = (int)fmin(at + MAX_BATCH, end);
        prefill(w->m, &w->kv, d->seq, d->c.ids.ids, at, to);
        if (n > LONG_PROMPT) progress_show(w->o, began, 1 - (double)(end - to) / n, n, "tokens");
    }
    if (d->c.done < end && !interrupted) d->c.done = end;
}

// Lookup decoding: where the last tokens (two to eight) have occurred before, what followed then is
// the guess, and behind the text's end the guess itself.
static void draft_look_back(Ids *text, int most) {
    int *ids = text->ids, n = (int)text->n, best = 1, at = 0;
    for (int end = n - 1; end >= 2 && best < 8; end--) {
        int same = 0;
        while (same < 8 && same < end && ids[end - 1 - same] == ids[n - 1 - same]) same++;
        if (same > best) best = same, at = end;
    }
    for (; at && most > 0; most--) push(text, text->ids[at++]);
}

// The small model draws with the random numbers that the large one will draw with, so that they
// part only where the models do.
static void draft_small(Draft *f, Sampler s, int most) {
    for (int n = (int)f->text.n; most > 0; most--, n++) {
        const float *logits = prefill(&f->small, &f->kv, 0, f->text.ids, f->done, n);
        if (interrupted) return;
        f->done = n;
        push(&f->text, sample(&s, logits, f->text.ids, n));
    }
}

// Speculative decoding (arXiv:2211.17192): a batch checks several guessed tokens at nearly the cost
// of one. Right are those that the sampler draws: the text is the same with and without guesses.
// Where all of the last ones were right twice as many follow, else half; where it has come to none,
// one is tried every 32 tokens. (A small model's guesses take time: it makes fewer.)
static int draft_propose(Machine *w, const Decoder *d) {
    Draft *f = &w->draft;
    const int *ids = d->c.ids.ids;
    int n = (int)d->c.ids.n, end = (int)f->text.n, same = 0;
    while (same < n - 1 && same < end && ids[same] == f->text.ids[same]) same++;
    if (end > f->n) f->guesses = same == end ? 2 * f->guesses : f->guesses / 2;
    else if (!f->guesses && w->steps % 32 == 0) f->guesses = 1;
    f->guesses = (int)fmin(f->guesses, f->small.layers ? 7 : MAX_DRAFT);
    f->done = (int)fmin(f->done, same);
    f->n = n;
    f->text.n = 0;
    for (int i = 0; i < n; i++) push(&f->text, ids[i]);
    int most = (int)fmin(f->guesses, fmin(f->kv.ctx - n, (double)d->budget - 1));
    if (f->small.layers) draft_small(f, d->s, most);
    else draft_look_back(&f->text, most);
    f->proposed += (int)f->text.n - n;
    return (int)f->text.n - n;
}

static Output decoder_text(const Machine *w, const Decoder *d, int from) {  // to be freed
    Output text = {.fd = -1};
    for (int i = from; i < (int)d->c.ids.n; i++) {
        Text token = decode(w->t, i ? d->c.ids.ids[i - 1] : -1, d->c.ids.ids[i]);
        output_write(&text, token.s, token.len);
    }
    return text;
}

#ifndef NO_TOOLS
// If the text ends in a question to the tool, asks it and appends its answer. What it answers is
// text: special tokens are not recognised in it.
static bool tool_use(Machine *w, Decoder *d) {
    if (!w->o->tool) return false;
    const char *before, *after;
    Output text = decoder_text(w, d, 0);
    Text question = tool_question((Text){text.memory, text.n}, &before, &after);
    Text answer = question.len ? tool_ask(w->o->tool, question) : question;
    Text said[] = {{before, strlen(before)}, answer, {after, strlen(after)}};
    bool turn = *before == '\n' && !strcmp(w->o->mode, "chat");  // the answer to a <tool_call>
    Prompt p = {0};
    free(text.memory);
    if (!answer.len) return false;
    for (int i = 0; i < 2 && turn; i++) prompt_piece(&p, w->t, i ? LATER_BEFORE : ASSISTANT_AFTER);
    for (int i = 0; i < 3; i++) prompt_append(&p, said[i], i == 1);
    if (turn) prompt_piece(&p, w->t, USER_AFTER);
    w->told |= turn;
    encode(w->t, (Text){p.s, p.n}, p.typed, false, &d->c.ids);
    prompt_free(&p);
    for (int i = 0; i < 3; i++)
        output_dim(d->out, i == 1 || d->out->thinking), output_text(d->out, said[i]);
    return true;
}
#else
#define tool_use(w, d) false
#endif

// Draws a decoder's next token, and those behind it as long as the guesses are right.
static void machine_draw(void *context, int i) {
    Machine *w = context;
    Decoder *d = &w->all[i];
    Ids *ids = &d->c.ids;
    size_t vocab = (size_t)w->m->c.vocab_size;
    const float *logits = w->logits + (size_t)d->first * vocab;
    d->s.p = w->p + (size_t)this_thread * vocab;
    d->s.candidates = w->candidates + (size_t)this_thread * vocab;
    if (d->budget > 0) d->c.done = (int)ids->n;
    for (bool agreed = true; agreed && d->budget > 0; logits += vocab) {
        bool fits = w->o->compiled && !d->out->thinking;
        d->s.forbidden = fits ? schema_mask(&d->schema, w->t) : NULL;
        if (fits && !d->s.forbidden) d->budget = 0;
        if (!d->budget) break;
        int previous = ids->ids[ids->n - 1], next = sample(&d->s, logits, ids->ids, (int)ids->n);
        if (w->o->samples) d->score -= likelihood_of(logits, (int)vocab, next);
        if (w->o->receipt) d->receipt = mix64(d->receipt + hash64(logits, vocab * sizeof(float)));
        agreed = ids->n < w->draft.text.n && next == w->draft.text.ids[ids->n];
        d->n_new++;
        d->budget = is_stop(w->t, next) ? 0 : d->budget - 1;
        if (is_stop(w->t, next)) break;
        d->c.done += agreed;
        push(ids, next);
        if (w->o->logprobs < 0) output_token(d->out, w->t, previous, next);
        else output_logprob(d->out, w->o, w->t, logits, w->m->c.vocab_size, ids->ids + ids->n - 2);
        d->c.thought = d->out->filter ? 1 + d->out->thinking : 0;
        bool ended = fits && schema_take(&d->schema, decode(w->t, previous, next));
        if (d->out->stopped || ended) d->budget = 0;
        else if (tool_use(w, d)) agreed = false;  // what follows is no guess
    }
}

// A step of n decoders: the logits of all that go on are computed in one batch, and each draws one
// token, or as many as were guessed right. False: none goes on, or it was Ctrl-C.
static bool machine_step(Machine *w, Decoder *all, int n) {
    Slot batch[MAX_SAMPLES + MAX_DRAFT];
    int n_slots = 0;
    w->all = all;
    for (Decoder *d = all; d < all + n; d++) {
        if (d->budget <= 0) continue;
        decoder_settle(w, d, 1);
        int n_guesses = w->o->draft ? draft_propose(w, d) : 0, pos = (int)d->c.ids.n - 1;
        d->first = n_slots;
        batch[n_slots++] = (Slot){d->c.ids.ids[pos], pos, d->seq, true};
        for (int i = 1; i <= n_guesses; i++)
            batch[n_slots++] = (Slot){w->draft.text.ids[pos + i], pos + i, d->seq, true};
    }
    if (interrupted || !n_slots) return false;
    w->logits = forward(w->m, &w->kv, batch, n_slots);
    if (!w->steps++) w->first_logits = seconds();
    bool alone = w->o->tool || w->o->compiled;  // what is asked or kept is one for all
    if (!alone) parallel(machine_draw, w, n);
    for (int i = 0; i < n && alone; i++) machine_draw(w, i);
    decoder_commit(w, all);
    return true;
}

// Begins the text of a decoder behind a prompt.
static void decoder_begin(const Machine *w, Decoder *d, Text prompt) {
    output_begin(d->out, w->o, w->t, prompt);
    d->schema = schema_begin(w->o->compiled);
}

// Runs n decoders until all have ended.
static void machine_run(Machine *w, Decoder *all, int n) {
    while (machine_step(w, all, n)) {}
    for (Decoder *d = all; d < all + n; d++) {
        output_end(d->out);
        if (!schema_end(&d->schema) && !interrupted) {
            fputs("run: the text ends before its JSON does: -n gives it more tokens, if any fit\n",
                  stderr);
            unfinished = true;
        }
        if (w->o->receipt) fprintf(stderr, "receipt: %016llx\n", d->receipt);
    }
}

// Sets up a machine and its first decoder, sequence 0: the session's text, or none yet.
static void machine_open(Machine *w, Decoder *d, const Options *o, const Model *m,
                         const Tokenizer *t, Output *out) {
    size_t vocab = (size_t)m->c.vocab_size * (size_t)o->threads;
    Model *small = &w->draft.small;
    bool chat = o->mode && !strcmp(o->mode, "chat");
    if (chat && !t->chat[USER_BEFORE].len && !t->chat[USER_AFTER].len)
        die("%s has no chat format: its model continues texts (-m generate)", t->path);
    if (chat && o->system && !(t->chat_flags[SYSTEM_BEFORE] & HAS_SYSTEM))
        fprintf(stderr, "run: %s has no place for a system turn: -y has no effect\n", t->path);
    *w = (Machine){.o = o, .m = m, .t = t, .ctx = context_of(o, m), .out = out,
                   .question = o->input, .draft = {.guesses = 1, .kv.ctx = context_of(o, m)},
                   .p = resize(NULL, vocab, sizeof *w->p),
                   .candidates = resize(NULL, vocab, sizeof *w->candidates)};
    *d = (Decoder){.s = sampler_new(o, m, t), .out = o->samples > 1 ? &d->own : out,
                   .own = {.fd = -1, .terminal = out->terminal}};
    d->s.p = w->p, d->s.candidates = w->candidates;
    int n = o->each ? (int)o->at_once : o->samples > 1 ? (int)o->samples : 0;
    cache_open(&w->kv, m, w->ctx, 1 + n);
    if (o->draft && strcmp(o->draft, "lookup")) {
        load_model(small, o->draft);
        if (small->c.vocab_size != m->c.vocab_size ||
            tokenizer_hash_of(small) != tokenizer_hash_of(m))
            die("%s cannot draft for %s: it has another tokenizer", o->draft, m->path);
        cache_open(&w->draft.kv, small, (int)fmin(w->ctx, small->c.seq_len), 1);
    }
    if (o->reward && o->samples > 1) reward_open(o, &w->judge);
    uint64_t rng = session_open(&w->session, o->session, &w->kv, &d->c);
    if (!o->seed && rng) d->s.rng = rng;
    d->seed = d->s.rng;
}

static void machine_close(Machine *w, Decoder *d) {
    bool drawn = !w->o->each && (w->steps || d->s.rng != d->seed);  // --each has said it
    if (!w->o->quiet && !w->o->seed && d->s.temperature > 0 && drawn)
        fprintf(stderr, "seed: %llu\n", d->seed);
    if (w->o->session && !interrupted) decoder_settle(w, d, 1);
    session_close(&w->session, &d->c, d->s.rng);  // a prompt that was interrupted is no part of it
    cache_close(&w->kv);
    if (w->draft.small.layers) cache_close(&w->draft.kv), free_model(&w->draft.small);
    if (w->judge.m.layers) member_close(&w->judge);
    free(w->p), free(w->candidates), free(w->draft.text.ids), free(w->turns.ids);
    free(d->c.ids.ids), free(d->own.memory);
}

// Makes the decoder of sample i: all that the trunk has, in a sequence and with a seed of its own.
static void samples_branch(Machine *w, const Decoder *trunk, Decoder *d, int i) {
    const Ids *ids = &trunk->c.ids;
    *d = *trunk;
    d->seq = i + 1;
    d->seed = d->s.rng = trunk->s.rng + (uint64_t)i * 0x9E3779B97F4A7C15u;
    d->out = &d->own;
    d->schema = schema_begin(w->o->compiled);
    d->own.memory = NULL;
    d->own.n = d->own.capacity = 0;
    output_write(d->out, trunk->own.memory, trunk->own.n);
    d->c.ids = (Ids){0};
    for (size_t j = 0; j < ids->n; j++) push(&d->c.ids, ids->ids[j]);
    cache_branch(&w->kv, 0, d->seq, d->c.done);
}

// Lets the model go on with a text, until it ends or its budget is used up. With -k it does so k
// times at once, in sequences that share the common beginning; all samples are printed, or with -b
// the best one, which becomes the trunk's text. The best is the likeliest by the mean
// log-probability of its tokens, or the one that a reward model ranks first.
static void decoder_continue(Machine *w, Decoder *trunk) {
    int k = (int)w->o->samples;
    if (k < 2) {
        machine_run(w, trunk, 1);
        return;
    }
    Decoder *d = resize(NULL, (size_t)k, sizeof *d), *best = d;
    decoder_settle(w, trunk, 1);
    for (int i = 0; i < k; i++) samples_branch(w, trunk, &d[i], i);
    machine_run(w, d, k);
    for (Decoder *s = d; s < d + k; s++) {
        Text answer = {s->own.memory + s->own.start, s->own.n - s->own.start - 1};  // a newline
        s->score = w->judge.m.layers ? reward_of(&w->judge, w->question, answer)
                                     : s->score / (s->n_new + !s->n_new);
        if (s->score > best->score) best = s;
    }
    for (Decoder *s = d; s < d + k; s++) {
        const char *what = w->judge.m.layers ? "reward" : "mean log-probability";
        if (!w->o->quiet)
            fprintf(stderr, "sample %d of %d: seed %llu, %d tokens, %s %.4f%s\n", s->seq, k,
                    s->seed, s->n_new, what, s->score, s == best ? ", the best" : "");
        if (!w->o->best || s == best) output_write(w->out, s->own.memory, s->own.n);
        trunk->n_new += s->n_new;
        free(s->own.memory);
        if (w->o->best && s == best && s->n_new) {  // it was not interrupted before
            cache_branch(&w->kv, s->seq, 0, s->c.done);
            free(trunk->c.ids.ids);
            trunk->c = s->c;
            trunk->s.rng = s->s.rng;
            decoder_commit(w, trunk);
        } else free(s->c.ids.ids);
    }
    free(d);
    trunk->own.thinking = false;
    trunk->own.n = 0;
}
// ---- [5.6] generate -----------------------------------------------------------------------------
// `-m generate` continues a text; with -e several models do, and judge each other's answers. Enter
// with generate. It keeps nothing. Calls: machine_open, decoder_continue, given_likelihood.

// Appends a prompt's tokens and returns how many may be drawn after them. One that has no room ends
// the program, or with --each is left to it.
static long long start_text(const Options *o, const Model *m, const Tokenizer *t, Text prompt,
                            Ids *ids) {
    long long before = (long long)ids->n, left;
    int ctx = context_of(o, m), start = t->h.bos >= 0 ? t->h.bos : t->h.eos;
    encode(t, prompt, NULL, before == 0, ids);
    bool fits = (long long)ids->n - before <= ctx;
    if (!fits && !o->each)
        die("the prompt has %zu tokens, the context of %s only %d: shorten it, or see -c",
            ids->n - (size_t)before, m->path, ctx);
    if (!ids->n && start < 0)
        die("the prompt is empty, and %s has neither BOS nor EOS to start from", m->path);
    if (!ids->n) push(ids, start);
    left = ctx + 1 - (long long)ids->n;
    if (!t->llama2c || !fits) return o->steps ? o->steps : left > 0 ? left : ctx - ctx / 2;
    // llama2c.c counts positions, the prompt's included, and stays within the context.
    // (A session's last token is no such position yet: it was drawn, and not computed.)
    long long counted = o->steps + (before ? before : 1) - (long long)ids->n;
    if (o->steps && left > counted) left = counted;
    if (left < 0) ids->n -= (size_t)-left;
    return left > 0 ? left : 0;
}
static void generate(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    double start = seconds();
    Machine w;
    Decoder d;
    machine_open(&w, &d, o, m, t, out);
    const Ids *ids = &d.c.ids;
    size_t before = ids->n;
    d.budget = start_text(o, m, t, o->input, &d.c.ids);
    int n_prompt = (int)(ids->n - before);
    if (before == 0) d.c.keep = n_prompt < 4 ? n_prompt : 4;
    for (size_t i = before; i < ids->n && t->llama2c && !o->compiled; i++)
        if (i) output_token(d.out, t, ids->ids[i - 1], ids->ids[i]);
    if (n_prompt > LONG_PROMPT && d.budget > 0) decoder_settle(&w, &d, 1);  // says how far it is
    if (!t->llama2c && !o->suffix && !o->compiled) output_text(d.out, o->input);
    if (d.c.thought > 1) output_begin(d.out, o, t, (Text){"<think>", 7});
    Output text = decoder_text(&w, &d, d.c.thought ? (int)before : 0);  // it may have opened one
    decoder_begin(&w, &d, (Text){text.memory, text.n});
    free(text.memory);
    if (o->input.len) tool_use(&w, &d);
    decoder_continue(&w, &d);
    double reading = w.first_logits - start, writing = seconds() - w.first_logits;
    if (w.steps && !o->quiet)
        fprintf(stderr, "prompt: %d tokens, %.1f tok/s; generated: %d tokens, %.1f tok/s\n",
                n_prompt, n_prompt / reading, d.n_new, d.n_new > 1 ? (d.n_new - 1) / writing : 0.0);
    if (w.steps && !o->quiet && o->draft)
        fprintf(stderr, "speculation: %d tokens proposed, %d accepted, %.2f tokens per forward\n",
                w.draft.proposed, d.n_new - w.steps, (double)d.n_new / w.steps);
    machine_close(&w, &d);
}

#ifndef NO_ENSEMBLE
// How good an answer is for a judge: its reward, or minus its bits per byte, a measure that does
// not depend on the tokenizer. What is beyond the judge's context does not count.
static double member_score(const Options *o, const Member *judge, Text answer) {
    if (o->reward) return reward_of(judge, o->input, answer);
    Ids ids = {0};
    Cache kv;
    start_text(o, &judge->m, &judge->t, o->input, &ids);
    int n_prompt = (int)ids.n;
    encode(&judge->t, answer, NULL, false, &ids);
    int n = (int)ids.n - n_prompt, most = judge->m.c.seq_len + 1 - n_prompt;
    if (most > n) most = n;
    cache_open(&kv, &judge->m, (int)ids.n, 1);
    Given g = {.m = &judge->m, .kv = &kv, .ids = ids.ids, .end = n_prompt + most - 1};
    double sum = given_likelihood(&g, n_prompt - 1);
    cache_close(&kv);
    free(ids.ids);
    return -sum / 0.69314718055994531 / ((double)answer.len * most / n);
}

// All models answer the prompt. The answer that pleases its judges best is printed: the reward
// model, or else all of them, by the average.
static void ensemble(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    Member all[1 + MAX_LIST] = {{*m, *t, {.fd = -1}}}, reward = {.answer = {.fd = -1}};
    Member *end = all + 1 + o->others.n, *judges = o->reward ? &reward : all, *best = all;
    int n_judges = o->reward ? 1 : 1 + o->others.n;
    Output told = {.fd = 2, .terminal = isatty(2)};
    double highest = -INFINITY;
    if (o->reward) reward_open(o, &reward);
    for (Member *e = all + 1; e < end; e++) member_open(e, o->others.of[e - all - 1]);
    for (Member *e = all; e < end && !interrupted; e++) {
        if (!o->quiet) fprintf(stderr, "%s answers\n", e->m.path);
        generate(o, &e->m, &e->t, &e->answer);
    }
    for (Member *e = all; e < end && !interrupted; e++) {
        Text answer = {e->answer.memory + e->answer.start, e->answer.n - e->answer.start - 1};
        double sum = 0;
        if (!o->quiet) fprintf(stderr, "%s's answer:", e->m.path);
        for (int i = 0; i < n_judges; i++) {
            double score = member_score(o, &judges[i], answer);
            if (!o->quiet) fprintf(stderr, " %.4f", o->reward ? score : -score);
            sum += score;
        }
        if (!o->quiet && o->reward) fputs("\n", stderr);
        else if (!o->quiet) fprintf(stderr, " bits per byte, mean %.4f\n", -sum / n_judges);
        if (sum > highest) highest = sum, best = e;
    }
    if (!interrupted && !o->quiet) fprintf(stderr, "the best answer is %s's\n", best->m.path);
    if (!interrupted) output_text(out, (Text){best->answer.memory, best->answer.n});
    for (Member *e = all; e < end; e++) {
        Text lost = {e->answer.memory, e == best || interrupted || o->quiet ? 0 : e->answer.n};
        if (lost.len) fputs("not chosen: ", stderr), output_text(&told, lost);
    }
    free(told.memory);
    if (o->reward) member_close(&reward);
    for (Member *e = all + 1; e < end; e++) member_close(e);
    free(all->answer.memory);
}
#endif
// ---- [5.7] chat ---------------------------------------------------------------------------------
// `-m chat`: a conversation. Its keys and values stay in the cache, and in a session's file, from
// turn to turn: a turn costs only its own tokens. Enter with chat. It keeps a Machine and where the
// turns start. Calls: prompt_turn, decoder_continue, session_save, session_read.

#ifndef NO_CHAT
// What is wrong is said. The chat goes on; but if nobody types in it, it ends with status 1.
#define chat_wrong(...) (tell(__VA_ARGS__), (void)(unfinished |= !isatty(0)))

#ifndef NO_SESSIONS
// Runs /save or /load. Only a session is written over.
static void chat_file(Machine *w, Decoder *d, bool save, const char *path) {
    Session s = {.path = path, .fd = -1, .kv = &w->kv};
    bool used = same_file(path, w->o->session) || same_file(path, w->o->output);
    const char *wrong = used ? "it is in use"
                             : session_lock(path, save ? O_RDWR | O_CREAT : O_RDONLY, &s.fd);
    if (!wrong && (!save || lseek(s.fd, 0, SEEK_END)))
        wrong = session_read(s.fd, &s.h, &w->kv, save ? NULL : &d->c);
    if (!wrong && save) wrong = session_save(&s, &d->c, d->c.done, d->s.rng);
    if (s.fd >= 0) close(s.fd);
    if (wrong) chat_wrong("cannot %s %s: %s", save ? "write" : "open", path, wrong);
    else tell("%s: %zu tokens", path, d->c.ids.n);
    if (wrong || save) return;
    w->turns.n = 0;
    decoder_commit(w, d);
}
#else
#define chat_file(w, d, save, path) chat_wrong("this program was built without sessions")
#endif

// Takes the last turn back, or all of them.
static void chat_undo(Machine *w, Decoder *d, bool all) {
    w->turns.n = all || !w->turns.n ? 0 : w->turns.n - 2;
    const int *turn = w->turns.ids + w->turns.n;
    bool part = !all && turn[0];  // the token before it may have become another one
    if (part) push(&d->c.ids, turn[1]);
    decoder_cut(w, d, part ? turn[0] - 1 : 0, part);
}

// /set NAME VALUE: how the next answers are drawn. Returns whether there is such a name and value.
static bool chat_set(Sampler *s, const char *words) {
    const struct { const char *name; float *f; int *i; double most; } all[] = {
        {"temperature", &s->temperature, NULL, 1e9}, {"top-p", &s->top_p, NULL, 1},
        {"min-p", &s->min_p, NULL, 1}, {"repeat-penalty", &s->repeat_penalty, NULL, 1e3},
        {"dry", &s->dry, NULL, 1e3}, {"top-k", NULL, &s->top_k, 1 << 24},
        {"repeat-last", NULL, &s->repeat_last, 1 << 24}};
    size_t n = strcspn(words, " \t");
    char *end;
    double value = strtod(words + n, &end);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (n != strlen(all[i].name) || strncmp(words, all[i].name, n)) continue;
        double least = all[i].f == &s->repeat_penalty ? 1e-3 : 0;
        bool right = end > words + n && !*end && value >= least && value <= all[i].most;
        if (right && all[i].f) *all[i].f = (float)value;
        else if (right) *all[i].i = (int)value;
        return right;
    }
    return false;
}

// Runs a command that was typed. False: it ends the chat.
static void chat_turn(Machine *w, Decoder *d, Text user);
static bool chat_command(Machine *w, Decoder *d, char *line) {
    static const char help[] =
        "/again: another answer; /undo takes back the last turn, /clear all turns\n"
        "/system TEXT: a new conversation, TEXT is its system turn; /exit ends the chat\n"
        "/set temperature 0.5 (or top-p, top-k, min-p, repeat-penalty, repeat-last, dry)\n"
        "/save FILE and /load FILE keep a conversation; /stats; //TEXT sends /TEXT\n"
        "\\ at the end of a line: the next one, too; \"\"\" before and after several lines\n"
        "Ctrl-C ends an answer, Ctrl-D the chat\n";
    static char system_turn[1 << 16];
    for (size_t n = strlen(line); strchr(" \t", line[n - 1]); n--) line[n - 1] = 0;
    char *rest = line + strcspn(line, " \t");
    if (*rest) *rest++ = 0;
    rest += strspn(rest, " \t");
    bool save = !strcmp(line, "/save"), file = save || !strcmp(line, "/load");
    bool undo = !strcmp(line, "/undo"), again = !strcmp(line, "/again");
    bool system = !strcmp(line, "/system"), place = w->t->chat_flags[SYSTEM_BEFORE] & HAS_SYSTEM;
    if (!strcmp(line, "/exit") || !strcmp(line, "/bye")) return false;
    if (file && *rest) chat_file(w, d, save, rest);
    else if (file) chat_wrong("%s needs the name of a file", line);
    else if (!strcmp(line, "/stats"))
        fprintf(stderr, "%zu of %d tokens, %.1f MB of keys and values; last turn: %.1f tok/s\n",
                d->c.ids.n, w->ctx, (double)w->kv.page_bytes * d->c.done / PAGE_POSITIONS / 1e6,
                w->rate);
    else if ((undo || again) && !w->turns.n) chat_wrong("there is no turn to take back");
    else if (again && !w->question.s) chat_wrong("that turn's text is gone: type it again");
    else if (system && !place) chat_wrong("%s has no place for a system turn", w->t->path);
    else if (undo || again || system || !strcmp(line, "/clear")) {
        chat_undo(w, d, !undo && !again);
        if (system) snprintf(system_turn, sizeof system_turn, "%s", rest);
        if (system) w->system = system_turn;
        if (again) chat_turn(w, d, w->question);
        else w->question = (Text){0};
        if (!again && isatty(2))
            fprintf(stderr, "(the conversation has %zu tokens)\n", d->c.ids.n);
    } else if (!strcmp(line, "/help")) fputs(help, stderr);
    else if (strcmp(line, "/set"))
        chat_wrong("%s is not a command: see /help; // sends a text that begins with /", line);
    else if (!chat_set(&d->s, rest)) chat_wrong("/set %s: no such name or value; see /help", rest);
    return true;
}

// Lines at a terminal, with the keys that shells have: arrows, Home, End, Ctrl-A E B F K U W L D P
// N, and a history. What is pasted comes as one line, with its line breaks.
enum { KEY_DELETE = 256 + 3, KEY_PASTE = 256 + 200, KEY_PASTED, NO_KEY = -1 };
typedef struct {
    const char *prompt;
    Output text;        // the line
    size_t at;          // the cursor's place in it
    int row;            // of the cursor on the screen, from the line's first
} Line;
static struct { char **lines; int n; } line_history;

static int line_columns(int fd, int usual) {  // of a terminal, if it tells them
    struct winsize size;
    return ioctl(fd, TIOCGWINSZ, &size) || size.ws_col < 2 ? usual : size.ws_col;
}

// Shows the line: what was there goes, and rows are broken here, as terminals differ in that.
static void line_draw(Line *e) {
    Output out = {.fd = 2, .terminal = true}, all = {.fd = -1};
    int row = 0, column = 0, cursor_row = 0, cursor_column = 0, most = line_columns(2, 80);
    fprintf(stderr, e->row ? "\r\033[%dA\033[J" : "\r\033[J", e->row);
    output_write(&all, e->prompt, strlen(e->prompt));
    output_write(&all, e->text.memory, e->text.n);
    output_write(&all, " ", 1);  // the cursor's place at the end
    for (size_t i = 0, used; i < all.n; i += used) {
        uint32_t c = next_char(all.memory + i, all.n - i, &used);
        int width = abs(wcwidth((wchar_t)c));  // 2 in East Asia, 0 for marks, -1: unknown
        width = c == '\n' ? 0 : c != '\t' && (c < 32 || c == 127) ? 2 : width;
        bool full = column + width > most;
        if (full) output_put(&out, "\r\n", 2, SIZE_MAX), row++, column = 0;
        if (i == strlen(e->prompt) + e->at) cursor_row = row, cursor_column = column;
        column += width;
        for (size_t k = 0; k < used && c != '\n'; k++)
            output_byte(&out, *(c == '\t' ? " " : all.memory + i + k));
        if (c == '\n') output_put(&out, "\r\n", 2, SIZE_MAX), row++, column = 0;
    }
    output_put(&out, "\r", 1, 0);
    if (row > cursor_row) fprintf(stderr, "\033[%dA", row - cursor_row);
    if (cursor_column) fprintf(stderr, "\033[%dC", cursor_column);
    e->row = cursor_row;
    free(out.memory), free(all.memory);
}

// The next key: a byte, or one of those above; NO_KEY: the end, or errno is EINTR. Arrows, Home and
// End are Ctrl-P N F B, A and E.
static int line_key(void) {
    static const char codes[] = "ABCDFH", keys[] = "\x10\x0e\x06\x02\x05\x01";
    uint8_t c = 0;
    int number = 0, sequence = 0;
    errno = 0;
    do {
        if (read(0, &c, 1) != 1) return NO_KEY;
        if (!sequence) sequence = c == 27;
        else if (sequence == 1) sequence = c == '[' || c == 'O' ? 2 : 0;
        else if (c >= '0' && c <= '9' && number < 1000) number = 10 * number + c - '0';
        else if (c == '~') return number == 1 || number == 7 ? 1
                                  : number == 4 || number == 8 ? 5 : 256 + number;
        else if (c >= '@') return strchr(codes, c) ? keys[strchr(codes, c) - codes] : 256;
    } while (sequence);
    return c;
}

// Replaces n bytes at a place by others; the cursor stands behind these.
static void line_replace(Line *e, size_t at, size_t n, const char *by, size_t len) {
    output_put(&e->text, by, len, SIZE_MAX);  // room for them
    memmove(e->text.memory + at + len, e->text.memory + at + n, e->text.n - len - at - n);
    memcpy(e->text.memory + at, by, len);
    e->text.n -= n;
    e->at = at + len;
}
// The place of the character before a place or behind it.
static size_t line_step(const Line *e, size_t at, int by) {
    do at = by < 0 ? at - (at > 0) : at + (at < e->text.n);
    while (at && at < e->text.n && ((uint8_t)e->text.memory[at] & 0xc0) == 0x80);
    return at;
}

// Does what a key says. False: the line is complete.
static bool line_press(Line *e, int key, int *shown, bool *pasting) {
    size_t word = e->at, left = line_step(e, e->at, -1), right = line_step(e, e->at, 1);
    char c = (char)key;
    const char *old = NULL;
    while (word && e->text.memory[word - 1] == ' ') word--;
    while (word && e->text.memory[word - 1] != ' ') word--;
    if (key == KEY_PASTE || key == KEY_PASTED) *pasting = key == KEY_PASTE;
    else if ((key == '\n' || key == '\r') && !*pasting) return false;
    else if (key == '\r') line_replace(e, e->at, 0, "\n", 1);
    else if (key == 127 || key == 8) line_replace(e, left, e->at - left, "", 0);
    else if (key == KEY_DELETE || key == 4) line_replace(e, e->at, right - e->at, "", 0);
    else if (key == 23) line_replace(e, word, e->at - word, "", 0);             // Ctrl-W
    else if (key == 21) line_replace(e, 0, e->at, "", 0);                       // Ctrl-U
    else if (key == 11) line_replace(e, e->at, e->text.n - e->at, "", 0);       // Ctrl-K
    else if (key == 1) e->at = 0;
    else if (key == 5) e->at = e->text.n;
    else if (key == 2) e->at = left;
    else if (key == 6) e->at = right;
    else if (key == 12) e->row = write(2, "\033[H\033[2J", 7) < 0;              // Ctrl-L
    else if (key == 16 && *shown > 0) old = line_history.lines[--*shown];
    else if (key == 14 && *shown < line_history.n)
        old = ++*shown < line_history.n ? line_history.lines[*shown] : "";
    else if (key < 256 && (key >= 32 || key == '\t' || *pasting))
        line_replace(e, e->at, 0, &c, 1);
    if (old) line_replace(e, 0, e->text.n, old, strlen(old));
    return true;
}

// Reads a line as getline does. Returns its length; -1: the input ends, or errno is EINTR.
static ssize_t line_edit(char **s, size_t *capacity, const char *prompt) {
    Line e = {.prompt = prompt, .text = {.fd = -1}};
    int key, shown = line_history.n;
    bool pasting = false;
    struct pollfd more = {.fd = 0, .events = POLLIN};
    terminal_set(true);
    do {  // pasted text, and what was typed ahead, is shown at once
        if (!pasting && (e.text.n == 0 || poll(&more, 1, 0) <= 0)) line_draw(&e);
        key = line_key();
        if (key != NO_KEY && interrupted == SIGINT) interrupted = 0;
    } while (key != NO_KEY && (key != 4 || e.text.n) && line_press(&e, key, &shown, &pasting));
    bool complete = key == '\n' || key == '\r', stopped = errno == EINTR;
    e.at = e.text.n;
    line_draw(&e);
    if (!stopped && write(2, "\n", 1) < 0) {}
    errno = stopped ? EINTR : 0;
    output_put(&e.text, "", 1, SIZE_MAX);
    free(*s);
    *s = e.text.memory;
    *capacity = e.text.capacity;
    if (!complete || e.text.n == 1) return complete ? 0 : -1;
    line_history.lines = resize(line_history.lines, (size_t)line_history.n + 1, sizeof(char *));
    line_history.lines[line_history.n++] = memcpy(resize(NULL, e.text.n, 1), *s, e.text.n);
    return (ssize_t)e.text.n - 1;
}

// Reads the next message: a line, more of them where \ ends one, or those between two lines of """.
// One that is no command and begins with / has another / there. False: there is none. Ctrl-C drops
// it, twice without a key between them ends the program.
static bool chat_message(bool prompt, Prompt *p) {
    static char *s;  // the line
    static size_t capacity;
    const char *term = getenv("TERM");
    bool block = false, more = true, any = false;
    bool edited = prompt && isatty(2) && term && strcmp(term, "dumb");
    for (p->n = 0; more;) {
        ssize_t n = -1;
        for (errno = EINTR; n < 0 && errno == EINTR && interrupted != SIGTERM;) {
            if (prompt) fputs(interrupted ? "\n(Ctrl-D ends the chat)\n" : "", stderr);
            if (prompt && interrupted) any = block = false, p->n = 0;
            if (prompt && !edited) fputs("> ", stderr);
            clearerr(stdin);
            errno = 0;
            n = edited ? line_edit(&s, &capacity, any ? "  " : "> ")
                       : getline(&s, &capacity, stdin);
        }
        if (n < 0 && errno && !interrupted) die("cannot read stdin: %s", strerror(errno));
        if (interrupted == SIGINT) interrupted = 0;  // at the prompt there was nothing to end
        if (n < 0) return any;
        while (n > 0 && (s[n - 1] == '\n' || s[n - 1] == '\r')) n--;
        bool marks = n == 3 && !memcmp(s, "\"\"\"", 3) && (block || !any);
        bool goes_on = !block && n && s[n - 1] == '\\';
        block ^= marks;
        more = block || goes_on;
        if (marks) continue;
        if (any) prompt_append(p, (Text){"\n", 1}, true);
        else if (block && *s == '/') prompt_append(p, (Text){"/", 1}, true);
        prompt_append(p, (Text){s, (size_t)(n - goes_on)}, true);
        any = true;
        if (n < 4095 || edited || !isatty(0)) continue;
        fputs("run: a terminal cuts lines after 4,095 bytes: not sent; see /help\n", stderr);
        p->n = 0, more = false;
    }
    return true;
}

// Rewrites the turn whose tokens begin at `start` as the chat format has it once it is answered:
// `settled`, without what it leaves out of answers and of earlier turns. p: what was answered. The
// drawn tokens stay where the text does; what old and new tokens begin with is not computed again.
static void chat_settle(Machine *w, Decoder *d, Prompt *p, Prompt *settled, int start, int answer) {
    Ids *ids = &d->c.ids;
    Output said = decoder_text(w, d, answer);
    int old = (int)ids->n, same = 0;
    prompt_append(p, (Text){said.memory, said.n}, true);
    prompt_append(settled, prompt_text(w->t, REPLY_BEFORE, (Text){said.memory, said.n}), true);
    free(said.memory);
    prompt_encode(settled, w->t, start == 0, ids);
    int n = (int)ids->n - old, drawn = old - answer;
    bool kept = n >= drawn && !memcmp(ids->ids + answer, ids->ids + ids->n - drawn,
                                      (size_t)drawn * sizeof(int));
    if (!kept && p->n == settled->n && !memcmp(p->s, settled->s, p->n)) n = 0, ids->n = (size_t)old;
    if (!n) return;
    while (same < n && start + same < old && ids->ids[start + same] == ids->ids[old + same]) same++;
    decoder_cut(w, d, start + same, n - same);
}

// Appends a user's turn and the model's reply; a turn that has no room is left out.
static void chat_turn(Machine *w, Decoder *d, Text user) {
    const Options *o = w->o;
    const Tokenizer *t = w->t;
    Text system = {w->system, w->system ? strlen(w->system) : 0};
    Ids *ids = &d->c.ids;
    int start = (int)ids->n, last = start ? ids->ids[start - 1] : -1;
    int at = start - (start && decode(t, last, last).len);  // where the prompt's tokens begin
    double began = seconds();
    Prompt p = {0}, settled = {0};
    size_t head_end = prompt_turn(&p, t, last, system, user, USER_AFTER);
    ids->n = (size_t)at;
    prompt_encode(&p, t, start == 0, ids);
    if (!ids->n) die("%s has no token for any byte of this turn", t->path);
    int answer = (int)ids->n, n = answer - start;
    if (answer > w->ctx && n > w->ctx / 2) {
        chat_wrong("this turn has %d tokens, too many for the context of %d, of which %d are in "
                      "use: it is left out", n, w->ctx, start);
        ids->n = (size_t)start;
        if (start) ids->ids[start - 1] = last;
        w->question = (Text){0};
    } else {
        w->question = user;
        d->c.done = (int)fmin(d->c.done, at);
        if (start && ids->ids[start - 1] != last) d->c.saved = (int)fmin(d->c.saved, at);
        if (!start) d->c.keep = prompt_keep(&p, t, head_end);
        push(&w->turns, start), push(&w->turns, last);
        d->budget = o->steps > 0 ? o->steps : w->ctx;
        d->n_new = d->out->column = 0;
        // (Where a line is broken a space is none any more, and a stop that has one is not found.)
        d->out->columns = o->stops.n ? 0 : line_columns(w->out->fd, 0);
        w->told = false;
        decoder_begin(w, d, t->chat[USER_AFTER]);
        decoder_continue(w, d);
        prompt_turn(&settled, t, last, system, user, REPLY_BEFORE);
        if (w->turns.n && !w->told && (d->n_new || !interrupted))
            chat_settle(w, d, &p, &settled, at, answer);
        decoder_settle(w, d, 1);  // before the next turn comes, as where a session is closed here
        w->rate = d->n_new / (seconds() - began);
        if (interrupted == SIGINT) interrupted = 0;
    }
    prompt_free(&p);
    prompt_free(&settled);
}

static void chat(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    uint32_t flags = t->chat_flags[SYSTEM_BEFORE];
    Machine w;
    Decoder d;
    Prompt message = {0}, asked = {0};
    machine_open(&w, &d, o, m, t, out);
    w.system = o->system;
    if (!setlocale(LC_CTYPE, "C.UTF-8")) setlocale(LC_CTYPE, "UTF-8");  // for wcwidth
    bool typed = isatty(0);
    const char *name = m->header ? m->header->name : m->path;
    if (typed && !o->quiet) tell("%s; /help lists what can be typed", name);
    if (d.c.ids.n && o->system && !o->quiet && !(flags & SYSTEM_LAST))
        fprintf(stderr, "(-y has no effect: the session has its system turn already)\n");
    if (o->input.len) chat_turn(&w, &d, o->input);
    for (bool more = true; more && chat_message(typed, &message);) {
        bool command = message.n && message.s[0] == '/', text = command && message.s[1] == '/';
        if (command && !text) more = chat_command(&w, &d, message.s);
        else if (message.n) {
            asked.n = 0;
            prompt_append(&asked, (Text){message.s + text, message.n - text}, true);
            chat_turn(&w, &d, (Text){asked.s, asked.n});
        }
    }
    prompt_free(&message), prompt_free(&asked);
    machine_close(&w, &d);
    if (unfinished && !interrupted) exit(1);  // without the file of -o
}
#endif
// ---- [5.8] explain ------------------------------------------------------------------------------
// `-m explain` generates and shows how each token came about: its rivals, what the model looked at,
// what each layer would already answer. It does so in the terminal, as a page (-o), or stage by
// stage (--trace). Enter at explain(). It keeps what the last pass has shown, which forward tells
// it through `watch`. Calls: start_text, machine_open, forward, sample.

#ifndef NO_EXPLAIN
enum { EXPLAIN_TOKENS = 160, EXPLAIN_ROWS = 5 };  // the text's last ones; of a list

typedef struct {
    Machine w;
    Decoder d;
    FILE *f;          // what is shown, in memory until it is sent
    bool page, color;
    int n;            // tokens so far; the pass computes the last of them, and the next is chosen
    float *mean;      // (ctx) attention paid to each: the mean of the heads asked for
    Candidate lens[MAX_LAYERS];  // the likeliest token if a layer were the last
} Explain;

// Writes text. Escapes stand for the bytes of what a terminal would obey or hide, or what cannot be
// in a string of the page's script.
static void explain_put(const Explain *e, Text text) {
    const char *slash = e->page ? "\\\\" : "\\";
    for (size_t used; text.len; text.s += used, text.len -= used) {
        uint32_t c = next_char(text.s, text.len, &used);
        bool shown = c >= 32 && (c < 127 || c >= 160) && c != 0xad && (c < 0x200b || c > 0x200f) &&
                     (c < 0x2028 || c > 0x202e) && (c < 0x2060 || c > 0x206f) && c != 0xfeff &&
                     c < 0xe0000 && (c != 0xfffd || used > 1);
        for (size_t i = 0; i < used && !shown && c != '\n'; i++)
            fprintf(e->f, "%sx%02x", slash, (uint8_t)text.s[i]);
        if (c == '\n') fprintf(e->f, "%sn", slash);
        else if (e->page && c < 128 && strchr("\"$<\\`", (int)c)) fprintf(e->f, "\\x%02x", c);
        else if (shown) fwrite(text.s, 1, used, e->f);
    }
}
// Writes a token as it is stored; control tokens have a text here.
static void explain_token(const Explain *e, int id) {
    const Tokenizer *t = e->w.t;
    explain_put(e, id < t->h.vocab_size ? t->tokens[id].text : (Text){"", 0});
}

// A row of weights for the page: C to Z are 3 to 26 times a 26th of a weight's root. Those under 1%
// are left out: numbers tell how many.
static void explain_weights(const Explain *e, const float *w) {
    for (int i = 0, next = 0; i < e->n; i++) {
        int letter = '@' + (int)(26 * sqrtf(w[i]) + 0.5f);
        if (letter < 'C') continue;
        if (i > next) fprintf(e->f, "%d", i - next);
        fputc(letter, e->f);
        next = i + 1;
    }
    fputc(',', e->f);
}

// Attention goes into the page, all of it, and into the mean, what was asked for. The logit lens
// (nostalgebraist, "interpreting GPT: the logit lens", 2020) is what the model would answer if a
// layer were its last: its x is normed as the last one's. (This xb is not needed any more, nor in a
// pass of one token the second row of logits.)
static void explain_watch(void *context, const Pass *f, const char *stage) {
    Explain *e = context;
    const Config *c = &f->m->c;
    State *s = f->s;
    float *logits = row_of(s->logits, 1, c->vocab_size);
    int l = (int)e->w.o->layer, h = (int)e->w.o->head;
    int n_means = (l < 0 ? c->n_layers : 1) * (h < 0 ? c->n_heads : 1);
    for (int i = 0; i < c->n_heads && !strcmp(stage, "attend"); i++) {
        const float *w = row_of(s->scores, i, s->scores_width);
        bool asked = (l < 0 || l == f->layer) && (h < 0 || h == i);
        for (int t = 0; t < e->n && asked; t++) e->mean[t] += w[t] / (float)n_means;
        if (e->page) explain_weights(e, w);
    }
    if (strcmp(stage, "feed_forward_out")) return;
    last(f, 0);
    matmul(&(Product){.w = f->m->classifier, .y = logits}, 1, s->xb, &s->xq, 1);
    if (c->logit_cap > 0) soft_cap(logits, c->vocab_size, c->logit_cap);
    softmax(logits, c->vocab_size);
    int best = argmax(logits, c->vocab_size);
    e->lens[f->layer] = (Candidate){logits[best], best};
}

// With --trace, a line for each array: what it is, its width, norm sqrt(sum of x^2), first numbers.
static void explain_trace(void *context, const Pass *f, const char *stage) {
    const Explain *e = context;
    const Config *c = &f->m->c;
    const State *s = f->s;
    int q_dim = c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;
    int asked = (int)e->w.o->layer, head = e->w.o->head < 0 ? 0 : (int)e->w.o->head;
    const float *weights = s->scores ? row_of(s->scores, head, s->scores_width) : NULL;
    int gate = f->l ? f->l->w_gate.rows : 0, up = f->l && f->l->w_up.data ? gate : 0;
    const struct { const char *stage, *equation; const float *x; int n; } arrays[] = {
        {"embed", "x = token_embedding[token]", s->x, c->dim},
        {"attention_in", "xb = attn_norm(x)", s->xb, c->dim},
        {"position", "q = rope(wq xb)", s->q, q_dim},
        {"position", "k = rope(wk xb)", s->k, kv_dim},
        {"position", "v = wv xb", s->v, kv_dim},
        {"attend", "attention = softmax(q k)", weights, e->n},
        {"attend", "att_out = attention v", s->att_out, q_dim},
        {"wo", "xb = wo att_out", s->xb, c->dim},
        {"feed_forward_in", "x += xb", s->x, c->dim},
        {"feed_forward_in", "xb = ffn_norm(x)", s->xb, c->dim},
        {"router", "route = router xb", s->at->route, c->n_experts},
        {"route", "share = of experts visited", s->at->share, c->n_experts},
        {"w_gate w_up", "gate = w_gate xb", s->gate, gate},
        {"w_gate w_up", "up = w_up xb", s->up, up},
        {"activate", "gate = activation(gate) * up", s->gate, gate},
        {f->l && f->l->router.data ? "leave" : "w_down", "xb = w_down gate", s->xb, c->dim},
        {"feed_forward_out", "x += xb", s->x, c->dim},
        {"last", "xb = final_norm(x)", s->xb, c->dim},
        {"classifier", "logits = classifier xb", s->logits, c->vocab_size}};
    if (asked >= 0 && f->layer >= 0 && f->layer < c->n_layers && f->layer != asked) return;
    if (!strcmp(stage, "attention_in")) fprintf(e->f, "layer %d, head %d\n", f->layer, head);
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        const float *x = arrays[i].x;
        int n = arrays[i].n;
        if (!n || strcmp(stage, arrays[i].stage)) continue;
        fprintf(e->f, "%-29s %7d %10.4g ", arrays[i].equation, n, sqrt((double)sum16(x, x, n)));
        for (int j = 0; j < 3 && j < n; j++) fprintf(e->f, " %9.3g", (double)x[j]);
        fputc('\n', e->f);
    }
}

// A line's end: how likely a token is, or what part of the attention it gets.
static void explain_bar(const Explain *e, float part, int id) {
    int width = e->page ? 12 : 30;  // a phone is narrow
    fprintf(e->f, " %5.1f%% %-*.*s \"", (double)part * 100, width,
            (int)((double)part * width + 0.5), "##############################");
    explain_token(e, id);
    fputs("\"\n", e->f);
}
// The likeliest tokens (each is taken out of s.p), the chosen one, and why it was.
static void explain_choice(const Explain *e, int chosen, bool given) {
    const Sampler *s = &e->d.s;
    int vocab = s->vocab_size, n = s->kept ? s->kept : vocab, rank = 1;
    float p = s->p[chosen], sum = 0, from = 0;  // the tokens are parts of the line from 0 to 1
    for (int i = 0; i < vocab; i++) rank += s->p[i] > p || (i < chosen && s->p[i] == p);
    for (int i = 0; i < n; i++) {
        Candidate c = s->kept ? s->candidates[i] : (Candidate){s->p[i], i};
        if (c.token == chosen) from = sum;
        sum += c.p;
    }
    for (int i = 0; i < EXPLAIN_ROWS && i < vocab; i++) {
        int best = argmax(s->p, vocab);
        fputc(best == chosen ? '>' : ' ', e->f);
        explain_bar(e, s->p[best], best);
        s->p[best] = -1;
    }
    if (rank > EXPLAIN_ROWS) fputc('>', e->f), explain_bar(e, p, chosen);
    if (given) fprintf(e->f, "> given; it is number %d of the model's own guesses\n", rank);
    else if (s->temperature == 0) fputs("> the likeliest, as the temperature is 0\n", e->f);
    else fprintf(e->f, "> the number %.4f was drawn; its part is %.4f to %.4f of the %d kept\n",
                 (double)s->coin, (double)(from / sum), (double)((from + p) / sum), n);
}
// Where the pass was, what got most attention (taken out of the mean), what layers would answer.
static void explain_inside(const Explain *e) {
    const Model *m = e->w.m;
    const float *freqs = vec(&m->rope_freqs), pos = (float)(e->n - 1);
    fprintf(e->f, "position %d turns queries and keys by %.3g to %.3g radians, KV cache %.1f KiB\n",
            e->n - 1, (double)(pos * freqs[0]), (double)(pos * freqs[m->c.head_dim / 2 - 1]),
            e->n * (double)e->w.kv.page_bytes / PAGE_POSITIONS / 1024);
    for (int i = 0; i < EXPLAIN_ROWS && i < e->n; i++) {
        int at = argmax(e->mean, e->n);
        fprintf(e->f, "attention to %6d", at);
        explain_bar(e, e->mean[at], e->d.c.ids.ids[at]);
        e->mean[at] = -1;
    }
    for (int l = 0, next = 0, n; l < m->c.n_layers; l = next) {
        while (next < m->c.n_layers && e->lens[next].token == e->lens[l].token) next++;
        if (next == l + 1) n = fprintf(e->f, "layer %d:", l);
        else n = fprintf(e->f, "layers %d %s %d:", l, next == l + 2 ? "and" : "to", next - 1);
        fprintf(e->f, "%*s", 19 - n, "");
        explain_bar(e, e->lens[next - 1].p, e->lens[l].token);
    }
}
// The text; where there are colours, each token as red as it gets attention.
static void explain_text(const Explain *e) {
    int first = e->n > EXPLAIN_TOKENS ? e->n - EXPLAIN_TOKENS : 0;
    if (first) fputs("... ", e->f);
    for (int i = first; i < e->n; i++) {
        int shade = 16 + 36 * (int)(5.99f * sqrtf(e->mean[i]));  // of the 256 colours
        if (e->color) fprintf(e->f, "\033[48;5;%d;38;5;231m", shade);
        explain_token(e, e->d.c.ids.ids[i]);
    }
    fputs(e->color ? "\033[0m\n" : "\n", e->f);
}

// The page: a script that shows the tokens T, each with the attention of the pass that chose it.
static const char explain_html[] =
    "<!doctype html><html lang=en><meta charset=utf-8><title>Watch it think</title>\n"
    "<meta name=viewport content='width=device-width'><meta http-equiv=Content-Security-Policy\n"
    "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
    "<style>:root{color-scheme:light dark;--a:188,89,0;--map:var(--a)} small{margin:.3em}\n"
    "@media(prefers-color-scheme:dark){:root{--map:255,150,50}} body{overflow-wrap:anywhere;\n"
    "font:16px/1.5 system-ui,sans-serif;max-width:80em;margin:auto;padding:0 1em}\n"
    "#text{font:16px/2.1 monospace} canvas{outline:1px solid} .drawn{border-bottom:2px solid\n"
    "rgb(var(--a))} span{white-space:pre-wrap;cursor:pointer} [aria-current=true]{outline:2px\n"
    "solid} main{display:flex;flex-wrap:wrap;gap:0 2em} main *{max-width:100%}\n"
    "main div,canvas{width:26em;image-rendering:pixelated} pre{white-space:pre-wrap;\n"
    "font-size:min(1em,2.9vw);line-height:1.3}</style><h1>Watch it think</h1><p>Choose a token\n"
    "(arrow keys work, too) to see the pass of the model that chose it. It read the tokens\n"
    "before; their shade is the attention it paid to them. Underlined: generated.\n"
    "<div id=text tabindex=0></div><main><pre id=view aria-live=polite></pre><div>\n"
    "<p><label>Attention of <select id=heads onchange=choose(now)></select></label><p>&darr;\n"
    "chosen tokens, &rarr; those looked at, shades:<span id=shades></span><p><canvas id=map\n"
    "role=img aria-label='Attention of all'></canvas></div></main><p>Of the numbers from 0 to 1\n"
    "one is drawn; each token kept has a part of them, as large as it is likely. Positions turn\n"
    "pairs of numbers in queries and keys like hands of clocks, fast and slow ones: their angles\n"
    "tell how far apart two tokens are. The weights of a head add up to 1: one that looks for\n"
    "nothing in the text puts them on the first token, so that it gets much (attention sinks,\n"
    "arXiv:2309.17453). Weights under 1% are left out.<p id=made></p>\n<script>\n";
static const char explain_script[] =
    "];\n"
    "const $ = id => document.getElementById(id), N = T.length;\n"
    "let now = 0;\n"
    "// Attention to each token before token i: the mean of the rows that are chosen.\n"
    "function weights(i) {\n"
    "  const [from, n] = $('heads').value.split(',').map(Number), sum = Array(i).fill(0);\n"
    "  for (const row of T[i].a.split(',').slice(from, from + n))\n"
    "    [...row.replace(/\\d+/g, k => '@'.repeat(k))].forEach((letter, j) =>\n"
    "      sum[j] += ((letter.charCodeAt() - 64) / 26) ** 2 / n);\n"
    "  return sum;\n"
    "}\n"
    "function choose(i) {\n"
    "  now = Math.max(0, Math.min(N - 1, i || 0));\n"
    "  const w = weights(now), map = $('map').getContext('2d');\n"
    "  [...$('text').children].forEach((span, j) => {\n"
    "    span.setAttribute('aria-current', j == now);\n"
    "    span.style.background = w[j] ? `rgba(var(--a),${Math.sqrt(w[j])})` : '';\n"
    "  });\n"
    "  $('view').textContent = T[now].view;\n"
    "  $('map').width = $('map').height = N;\n"
    "  map.fillStyle = `rgb(${getComputedStyle(document.body).getPropertyValue('--map')})`;\n"
    "  const dot = (w, x, y, n) => { map.globalAlpha = Math.sqrt(w), map.fillRect(x, y, n, 1); };\n"
    "  T.forEach((t, i) => weights(i).forEach((w, j) => dot(w, j, i, 1)));\n"
    "  dot(.1, 0, now, N);\n"
    "  history.replaceState(null, '', '#t=' + now);\n"
    "}\n"
    "$('heads').add(new Option('all layers and heads', [layers * heads, 1]));\n"
    "for (let i = 0; i < layers; i++)\n"
    "  for (let h = -1; h < heads; h++)\n"
    "    $('heads').add(h < 0 ? new Option(`layer ${i}`, [i * heads, heads]) :\n"
    "      new Option(`layer ${i}, head ${h}`, [i * heads + h, 1]));\n"
    "T.forEach((t, i) => $('text').append(Object.assign(document.createElement('span'), {\n"
    "  textContent: t.t.replaceAll('\\\\n', '\\\\n\\n') || ' ', onclick: () => choose(i),\n"
    "  className: t.given ? '' : 'drawn'})));\n"
    "for (const p of [1, 5, 20, 50, 100])\n"
    "  $('shades').append(Object.assign(document.createElement('small'), {textContent: p + '%',\n"
    "    style: `border-bottom:.5em solid rgba(var(--map),${Math.sqrt(p / 100)})`}));\n"
    "$('made').textContent = made.map((word, i) => i && /[^\\w.\\/:=-]|^$/.test(word) ?\n"
    "  `'${word.replaceAll(\"'\", \"'\\\\''\")}'` : word).join(' ');\n"
    "$('text').onkeydown = e => choose(now + ({ArrowLeft: -1, ArrowRight: 1}[e.key] || 0));\n"
    "$('map').onclick = e => choose(Math.floor(e.offsetY / $('map').clientHeight * N));\n"
    "(onhashchange = () => choose(location.hash ? +location.hash.slice(3) : N - 1))();\n"
    "</script>\n";

// Ends the page's item of a token, which what the pass that chose it has shown began.
static void explain_item(const Explain *e, int id, bool given) {
    fputs("`,t:\"", e->f);
    explain_token(e, id);
    fprintf(e->f, "\",id:%d,given:%d},\n", id, given);
}

// Computes a pass and shows it; what follows is given, or drawn. Returns whether the text goes on.
static bool explain_pass(Explain *e) {
    Ids *ids = &e->d.c.ids;
    Sampler *s = &e->d.s;
    int n = e->n, last = ids->ids[n - 1];
    bool given = n < (int)ids->n, trace = e->w.o->trace;
    if (trace) fprintf(e->f, "token %d at position %d: width, norm, first values\n", last, n - 1);
    if (e->page) fputs("{a:\"", e->f);
    memset(e->mean, 0, (size_t)n * sizeof(float));
    const float *logits = forward(e->w.m, &e->w.kv, &(Slot){last, n - 1, 0, true}, 1);
    int next = given ? ids->ids[n] : sample(s, logits, ids->ids, n);
    if (given) memcpy(s->p, logits, (size_t)s->vocab_size * sizeof(float));
    if (given || s->temperature == 0) softmax(s->p, s->vocab_size);
    if (e->page) explain_weights(e, e->mean), fputs("\",view:`", e->f);
    else if (!trace) {
        fprintf(e->f, "\n== position %d, \"", n - 1);
        explain_token(e, last), fputs("\": next comes \"", e->f), explain_token(e, next);
        fputs("\" ==\n", e->f);
        explain_text(e);
    }
    explain_choice(e, next, given);
    if (!trace) explain_inside(e);
    if (e->page) explain_item(e, next, given);
    if (given) return true;
    push(ids, next);
    output_token(&e->d.own, e->w.t, last, next);
    return !is_stop(e->w.t, next) && !e->d.own.stopped;
}

// What was run, and with which model and settings; for a page the command, too, quoted for a shell.
static void explain_head(const Explain *e) {
    const Model *m = e->w.m;
    const Sampler *s = &e->d.s;
    const char *name = m->header ? m->header->name : m->path;
    if (e->page) fprintf(e->f, "%sconst layers = %d, heads = %d, made = [\"", explain_html,
                         m->c.n_layers, m->c.n_heads);
    explain_put(e, (Text){name, strlen(name)});
    fprintf(e->f, ", seed %llu: temperature %g, top-p %g, top-k %d, min-p %g, repetition penalty "
            "%g%s", e->d.seed, (double)s->temperature, (double)s->top_p, s->top_k, (double)s->min_p,
            (double)s->repeat_penalty, e->page ? ". Command:" : "");
    for (char **word = e->w.o->words; e->page && word && *word; word++) {
        fputs("\", \"", e->f);
        explain_put(e, (Text){*word, strlen(*word)});
    }
    fputs(e->page ? "\"], T = [\n{a:\"\",view:`The text's start." : "\n", e->f);
    if (e->page) explain_item(e, e->d.c.ids.ids[0], true);  // no pass has chosen the first token
    if (e->color) fputs("(the redder a token of the text, the more attention it gets)\n", e->f);
}

static void explain(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    const char *none = getenv("NO_COLOR"), *term = getenv("TERM");
    bool color = out->terminal && !o->trace && !(none && *none) && term && strcmp(term, "dumb");
    char *shown = NULL;
    size_t size = 0;
    if (o->layer >= m->c.n_layers || o->head >= m->c.n_heads)
        die("--layer goes to %d, --head to %d in %s", m->c.n_layers - 1, m->c.n_heads - 1, m->path);
    Explain e = {.page = o->output && !o->trace, .color = color};
    e.f = open_memstream(&shown, &size);
    if (!e.f) die("out of memory");
    machine_open(&e.w, &e.d, o, m, t, out);
    const Ids *ids = &e.d.c.ids;
    long long budget = start_text(o, m, t, o->input, &e.d.c.ids);
    output_begin(&e.d.own, o, t, (Text){"", 0});
    int n_prompt = (int)ids->n, ctx = e.w.ctx, end = (int)fmin(ctx, n_prompt - 1 + (double)budget);
    e.n = e.page ? 1 : n_prompt;  // the page shows the prompt's tokens, too
    e.mean = zeros((size_t)ctx, sizeof(float));
    get_state(&e.w.kv, 2);  // of the pass, and of the lens
    prefill(m, &e.w.kv, 0, ids->ids, 0, e.n - 1);
    explain_head(&e);
    void (*usual)(const Pass *) = attention;
    attention = attention_plain, watch = o->trace ? explain_trace : explain_watch, watcher = &e;
    for (bool more = true; more; e.n += more) {
        more = e.n <= end && !interrupted && explain_pass(&e);
        if (!more && e.page) fputs(explain_script, e.f);
        if (fflush(e.f) || ferror(e.f)) die("out of memory for what explain shows");
        output_write(out, shown, size), rewind(e.f);
    }
    attention = usual, watch = NULL;
    if (e.n > ctx && budget > e.n - n_prompt && !o->quiet)
        fprintf(stderr, "the context of %d positions is full: explain ends here\n", ctx);
    fclose(e.f);
    free(shown);
    free(e.mean);
    machine_close(&e.w, &e.d);
}
#endif
// ---- [5.9] tokenize, logits, eval ---------------------------------------------------------------
// For scripts: a text's token ids (`-m tokenize`), the logits of given ids (`-m logits`, with -S
// behind a session's), how well the model predicts a text (`-m eval`). Enter at tokenize,
// write_logits, evaluate. They keep nothing. Calls: encode, machine_open, given_likelihood.

static void tokenize(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    Ids ids = {0};
    (void)m;
    encode(t, o->input, NULL, true, &ids);
    for (size_t i = 0; i < ids.n; i++) output_print(out, i ? " %d" : "%d", ids.ids[i]);
    output_write(out, "\n", 1);
    free(ids.ids);
}

static void write_logits(const Options *o, const Model *m, const Tokenizer *none, Output *out) {
    Text text = o->input;
    Machine w;
    Decoder d;
    char *end;
    machine_open(&w, &d, o, m, none, out);
    Ids *ids = &d.c.ids;
    decoder_settle(&w, &d, 0);
    for (const char *p = text.s; p < text.s + text.len; p = end) {
        long id = strtol(p, &end, 10);
        if (end == p || id < 0 || id >= m->c.vocab_size)
            die("token id \"%.20s\" is not a number from 0 to %d", p, m->c.vocab_size - 1);
        push(ids, (int)id);
        end += strspn(end, " \t\n\v\f\r");
    }
    if ((int)ids->n == d.c.done) die("no token ids: give them with -i or -f (- is stdin)");
    if (ids->n > (size_t)w.ctx) die("%zu tokens are more than the context of %d", ids->n, w.ctx);
    if (!d.c.done) d.c.keep = ids->n < 4 ? (int)ids->n : 4;
    Given g = {.m = m, .kv = &w.kv, .ids = ids->ids, .done = d.c.done, .end = (int)ids->n};
    const float *logits;
    for (int i = g.done; i < g.end && (logits = given_logits(&g, i)); i++)
        output_write(out, logits, (size_t)m->c.vocab_size * sizeof(float));
    d.c.done = g.done;
    ids->n = (size_t)d.c.done;  // what was not computed is no part of the session
    machine_close(&w, &d);
}

// Strided windows: a window of W tokens starts every W/2 tokens; each token is predicted once, in
// the first window that holds it, with at least W/2 tokens before it but in the first window.
static void evaluate(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    int start = t->h.bos >= 0 ? t->h.bos : t->h.eos, ctx = context_of(o, m), scored = 0;
    int window = o->context || ctx < 2048 ? ctx : 2048;
    if (start < 0) die("%s has neither BOS nor EOS to start a text from", m->path);
    Ids all = {0};
    push(&all, start);
    encode(t, o->input, NULL, true, &all);
    bool twice = all.n > 1 && all.ids[1] == start;
    int n = (int)all.n - twice - 1;  // tokens to predict
    if (o->compiled) schema_check(o->compiled, o->input, input_name(o));
    if (n < 1) die("no text to evaluate in %s: -f or -i gives one (- is stdin)", input_name(o));
    Cache kv;
    cache_open(&kv, m, window, 1);
    double sum = 0, ln_2 = 0.69314718055994531;
    for (int from = 0, end; scored < n && !interrupted; from += window - window / 2, scored = end) {
        end = from + window < n ? from + window : n;
        Given g = {.m = m, .kv = &kv, .ids = all.ids + twice + from, .end = end - from};
        if (o->logprobs < 0) sum += given_likelihood(&g, scored - from);
        const float *logits;
        for (int i = scored - from; o->logprobs >= 0 && i < g.end; i++)
            if ((logits = given_logits(&g, i)))
                output_logprob(out, o, t, logits, m->c.vocab_size, g.ids + i);
        progress_show(o, o->started, (double)end / n, (double)o->input.len, "bytes");
    }
    if (!interrupted && o->logprobs < 0)
        output_print(out, "bits_per_byte: %.6f\nbits_per_token: %.6f\nperplexity: %.4f\n"
                     "tokens: %d\nbytes: %zu\nwindow: %d\n", sum / ln_2 / (double)o->input.len,
                     sum / ln_2 / n, exp_double(sum / n), n, o->input.len, window);
    free(all.ids);
    cache_close(&kv);
}
// ---- [5.10] compress ----------------------------------------------------------------------------
// A token of probability p costs -log2 p bits in an arithmetic coder, so a text that the model
// predicts well becomes small. Both modes, compress and decompress, run zip_text on probabilities
// that are equal to the last bit. Zip keeps what is learned of the text. Calls: encode, forward.
#ifndef NO_COMPRESS

// A text is a row of symbols: tokens, and bytes that no token stands for. The first ones are coded
// alone, the others in waves of up to 16 segments in lockstep, the first symbol of each, then the
// second of each: so the decoder computes 16 tokens as one batch, and segments learn from each
// other. All begin with the same prefix, the tokens before it, and end before the context is full.

enum {
    ZIP_CONTEXT = 1536,      // positions, if -c does not say: longer: slower, a little smaller
    ZIP_SEGMENTS = 16, ZIP_LEAST_CONTEXT = 16,
    ZIP_PREFIX = 256,        // of them for the prefix: a page, which all segments share
};

typedef struct {  // a file is this, and then what was coded
    char magic[8];        // "lmzc"; each version has a last letter of its own
    uint64_t file_hash;   // of all that follows
    uint64_t model;       // a hash of it and of the tokenizer
    uint64_t context;
    uint64_t symbols;     // of the text; none: it is stored as it is
    uint64_t text_hash;
} ZipHeader;

typedef struct { int symbol, next; float bias, squares; } ZipPair;  // next: of those after the same
typedef struct {
    const Model *m;
    const Tokenizer *t;
    Cache kv;                // sequence 0 has the prefix, 1 + s segment s
    const Options *o;
    Text in;                 // decoding: the coded bytes that are left, and then 8 zeros
    Output out;              // the result: a file or a text
    uint64_t low, range, code;
    int width, start;        // how many symbols there are; the token before the text
    Ids symbols;             // of the text
    size_t all, done;        // how many it has; those before the wave
    int missing;             // bytes of the input behind its end that were needed
    int prefix;              // tokens of it, at most
    int n, steps, step;      // segments; symbols of each; the one that is coded
    float *bias, *squares;   // (width) of symbols; the sums of their squared gradients
    int *first_pair, n_pairs;  // (width) of those after a token; 0: none
    ZipPair *pairs;          // the first is not used
    float *logits, *p;       // (n, vocab_size); (n, width) probabilities, then gradients
} Zip;

// ---- The arithmetic coder. What is coded so far says that a number lies in [low, low + range), of
// which the next symbol takes its share. Leading bytes that are certain are written, and the rest
// moves up (carryless, after D. Subbotin). The decoder knows the number's next 64 bits: code.
static void zip_shift(Zip *z) {
    if (!z->in.s) output_byte(&z->out, (char)(z->low >> 56));
    else if (z->in.len) z->code = z->code << 8 | (uint8_t)*z->in.s++, z->in.len--;
    else z->code <<= 8, z->missing++;
    z->low <<= 8, z->range <<= 8;
}
static uint32_t zip_share(float p) { return (uint32_t)(int32_t)(p * 0x1p30f) + 1; }
// Codes a symbol, and returns it. Each has a share of the interval; their sum is below 2^32.
static int zip_code(Zip *z, const float *p, int symbol) {
    const uint64_t top = 1ull << 56, bottom = 1ull << 48;
    uint32_t total = zip_share(p[0]), start = 0;
    for (int i = 1; i < z->width; i++) total += zip_share(p[i]);
    uint64_t unit = z->range / total, at = z->in.s ? (z->code - z->low) / unit : 0;
    int i = 0;
    while (z->in.s ? i < z->width - 1 && at >= start + zip_share(p[i]) : i < symbol)
        start += zip_share(p[i++]);
    z->low += start * unit;
    z->range = zip_share(p[i]) * unit;
    while ((z->low ^ (z->low + z->range)) < top || z->range < bottom) {
        if ((z->low ^ (z->low + z->range)) >= top) z->range = -z->low & (bottom - 1);
        zip_shift(z);
    }
    return i;
}

// ---- Probabilities, and what is learned: a bias of each symbol v, which is added to its logit,
// and another one after each token that v was seen after. They move along the gradient of
// ln p(symbol), which is (v is the symbol) - p[v], by Adagrad (Duchi et al., 2011): steps are
// divided by the root of the sum of squared gradients. The rates 0.6 and 0.4 were found by trying.
// The token that the model reads before a step of a segment. Steps up to 0 are the prefix's.
static int zip_before(const Zip *z, int s, int step) {
    size_t at = z->done + (size_t)(step + (step > 0 ? s * z->steps : 0));
    int symbol = at ? z->symbols.ids[at - 1] : z->start;
    return symbol < z->m->c.vocab_size ? symbol : z->start;
}

static void zip_predict(void *context, int s) {
    Zip *z = context;
    int vocab = z->m->c.vocab_size, width = z->width;
    float *logits = row_of(z->logits, s, vocab), *p = row_of(z->p, s, width);
    float of_bytes = largest(logits, vocab) - 16;  // so rare are they at first
    for (int i = 0; i < width; i++) p[i] = (i < vocab ? logits[i] : of_bytes) + z->bias[i];
    for (int i = z->first_pair[zip_before(z, s, z->step)]; i; i = z->pairs[i].next)
        p[z->pairs[i].symbol] += z->pairs[i].bias;
    softmax(p, width);
}

static void zip_adapt(float *bias, float *squares, float rate, float gradient) {
    *squares += gradient * gradient;
    *bias -= rate * gradient / sqrtf(*squares + 1);
}
static void zip_learn(Zip *z, const float *gradient, int before, int symbol) {
    int *first = &z->first_pair[before], i = *first;
    for (int v = 0; v < z->width; v++) zip_adapt(&z->bias[v], &z->squares[v], 0.6f, gradient[v]);
    while (i && z->pairs[i].symbol != symbol) i = z->pairs[i].next;
    if (!i) z->pairs[++z->n_pairs] = (ZipPair){symbol, *first, 0, 0}, *first = z->n_pairs;
    for (i = *first; i; i = z->pairs[i].next)
        zip_adapt(&z->pairs[i].bias, &z->pairs[i].squares, 0.4f, gradient[z->pairs[i].symbol]);
}

// Codes a step: the next symbol of each segment.
static void zip_step(Zip *z) {
    parallel(zip_predict, z, z->n);
    for (int s = 0; s < z->n; s++) {
        float *p = row_of(z->p, s, z->width);
        int *symbol = &z->symbols.ids[z->done + (size_t)(s * z->steps + z->step)];
        *symbol = zip_code(z, p, *symbol);
        p[*symbol] -= 1;
        zip_learn(z, p, zip_before(z, s, z->step), *symbol);
    }
    z->logits += (size_t)z->n * (size_t)z->m->c.vocab_size;
}

// Codes all symbols, which the encoder has: so it lets the model compute several steps at once. A
// wave has as few segments as have room for the rest.
static void zip_text(Zip *z) {
    int ids[ZIP_PREFIX], prefix = 0, most = z->in.s ? 1 : likelihood_batch(z->m);
    for (size_t end; z->done < z->all && z->missing <= 8; z->done = end, prefix = z->prefix) {
        size_t longest = (size_t)(z->done ? z->kv.ctx - prefix : z->prefix);
        size_t left = z->all - z->done, segments = z->done ? (left - 1) / longest + 1 : 1;
        z->n = segments < ZIP_SEGMENTS ? (int)segments : ZIP_SEGMENTS;
        left /= (size_t)z->n;
        z->steps = (int)(left < longest ? left : longest);
        end = z->done + (size_t)(z->n * z->steps);
        while (z->symbols.n < end) push(&z->symbols, 0);
        z->pairs = resize(z->pairs, end + 1, sizeof *z->pairs);
        for (int i = 0; i < prefix; i++) ids[i] = zip_before(z, 0, i - prefix);
        prefill(z->m, &z->kv, 0, ids, 0, prefix);
        for (int s = 0; s < z->n; s++) cache_branch(&z->kv, 0, 1 + s, prefix);
        for (z->step = 0; z->step < z->steps && z->missing <= 8;) {
            Slot batch[MAX_BATCH];
            int n = 0, done = z->step;
            if (interrupted) exit(130);
            for (; done < z->steps && (!n || n + z->n <= most); done++)
                for (int s = 0; s < z->n; s++)
                    batch[n++] = (Slot){zip_before(z, s, done), prefix + done, 1 + s, true};
            z->logits = forward(z->m, &z->kv, batch, n);
            for (; z->step < done; z->step++) zip_step(z);
            progress_show(z->o, z->o->started, (double)(z->done + (size_t)(done * z->n)) /
                          (double)z->all, (double)z->o->input.len, "bytes");
        }
    }
}

// ---- Text and symbols, and the file

// Appends the symbols of a text. Its tokens are looked for in it: what lies between, since the
// tokenizer changed it or left it out, are bytes.
static void zip_cut(Zip *z, Text text) {
    Tokenizer exact = *z->t;
    Ids ids = {0};
    const char *done = text.s, *end = text.s + text.len;
    exact.h.flags |= BARE;
    encode(&exact, text, NULL, false, &ids);
    for (size_t i = 0; i <= ids.n; i++) {
        Text token = i < ids.n ? z->t->tokens[ids.ids[i]].text : (Text){end, 0};
        size_t left = (size_t)(end - done), near = token.len + 64 < left ? token.len + 64 : left;
        const char *at = token.len ? memmem(done, near, token.s, token.len) : token.s;
        if (!at || (!token.len && i < ids.n)) continue;
        while (done < at) push(&z->symbols, z->m->c.vocab_size + (uint8_t)*done++);
        if (i < ids.n) push(&z->symbols, ids.ids[i]);
        done += token.len;
    }
    free(ids.ids);
}
static void zip_join(Zip *z) {
    for (size_t i = 0; i < z->symbols.n; i++) {
        int symbol = z->symbols.ids[i], byte = symbol - z->m->c.vocab_size;
        if (byte >= 0) output_byte(&z->out, (char)byte);
        else if (symbol < z->t->h.vocab_size)  // a damaged file can have others
            output_write(&z->out, z->t->tokens[symbol].text.s, z->t->tokens[symbol].text.len);
    }
}
static uint64_t zip_hash(Text file) { return hash64(file.s + 16, file.len - 16); }

static void zip_open(Zip *z, uint64_t context, Text coded) {
    size_t width = (size_t)z->m->c.vocab_size + 256;
    if (context < ZIP_LEAST_CONTEXT || context > (uint64_t)z->m->c.seq_len)
        die("a context of %llu: compress needs %d to %d positions", (unsigned long long)context,
            ZIP_LEAST_CONTEXT, z->m->c.seq_len);
    z->in = coded;
    for (int i = 0; i < 8 && coded.s; i++) zip_shift(z);
    z->range = UINT64_MAX;
    z->width = (int)width;
    z->start = z->t->h.bos >= 0 ? z->t->h.bos : z->t->h.eos >= 0 ? z->t->h.eos : 0;
    z->prefix = context / 4 < ZIP_PREFIX ? (int)context / 4 : ZIP_PREFIX;
    z->bias = zeros((2 + ZIP_SEGMENTS) * width, sizeof(float));
    z->squares = z->bias + width;
    z->p = z->squares + width;
    z->first_pair = zeros(width, sizeof(int));
    cache_open(&z->kv, z->m, (int)context, 1 + ZIP_SEGMENTS);
}

// Data with a byte in 64 that no text has is stored: it would take hours, for nothing.
static void zip_shrink(Zip *z, ZipHeader *h, Text text) {
    Output *out = &z->out;
    size_t strange = 0;
    zip_open(z, h->context, (Text){NULL, 0});
    for (size_t i = 0; i < text.len; i++) strange += (uint8_t)text.s[i] < 9;
    if (strange <= text.len / 64) zip_cut(z, text);
    z->all = z->symbols.n;
    output_write(out, h, sizeof *h);  // its place
    zip_text(z);
    z->low += (1ull << 48) - 1;  // two bytes and, not written, zeros are in the interval now
    zip_shift(z), zip_shift(z);
    bool stored = !z->all || out->n - sizeof *h >= text.len;
    if (stored) out->n = sizeof *h, output_write(out, text.s, text.len);
    h->symbols = stored ? 0 : z->all;
    h->text_hash = hash64(text.s, text.len);
    memcpy(out->memory, h, sizeof *h);
    h->file_hash = zip_hash((Text){out->memory, out->n});
    memcpy(out->memory, h, sizeof *h);
}

// Returns NULL, or what is wrong with the file; `mine` is what its header should be like.
static const char *zip_expand(Zip *z, const ZipHeader *mine, Text file) {
    ZipHeader h;
    if (file.len < sizeof h || memcmp(file.s, mine->magic, 3))
        return "is not a file that -m compress wrote, or is truncated";
    memcpy(&h, file.s, sizeof h);
    if (memcmp(h.magic, mine->magic, 8)) return "was compressed by another version of this program";
    if (h.file_hash != zip_hash(file)) return "is truncated, too long or damaged";
    if (h.model != mine->model)
        return "was compressed with another model or tokenizer (-z): -m decompress needs the same";
    Text coded = {file.s + sizeof h, file.len - sizeof h};
    zip_open(z, h.context, coded);
    z->all = h.symbols;
    zip_text(z);
    if (z->all) zip_join(z);
    else output_write(&z->out, coded.s, coded.len);
    if (hash64(z->out.memory, z->out.n) == h.text_hash) return NULL;
    return "does not give its text: other numbers are computed here; try -m check";
}

static void compress(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    bool back = !strcmp(o->mode, "decompress");
    int context = context_of(o, m);
    if (!o->context && context > ZIP_CONTEXT) context = ZIP_CONTEXT;
    Zip z = {.o = o, .m = m, .t = t, .out = {.fd = -1}};
    ZipHeader h = {"lmzc", .model = mix64(model_hash(m)) + hash64(t->file, t->file_size),
                   .context = (uint64_t)context};
    const char *wrong = back ? zip_expand(&z, &h, o->input) : NULL;
    if (!back) zip_shrink(&z, &h, o->input);
    if (wrong) die("%s %s", input_name(o), wrong);
    size_t n = z.out.n, bytes = o->input.len;
    if (!o->quiet)
        fprintf(stderr, "%zu bytes -> %zu bytes: %.4f bits per byte, %.1f s\n", bytes, n,
                8 * (double)(back ? bytes : n) / fmax((double)(back ? n : bytes), 1),
                seconds() - o->started);
    output_write(out, z.out.memory, n);
    free(z.bias), free(z.first_pair), free(z.pairs);
    free(z.symbols.ids), free(z.out.memory);
    cache_close(&z.kv);
}
#endif
// ---- [5.11] check -------------------------------------------------------------------------------
// `-m check`: a checkpoint certifies itself. It holds the tokens of some texts, and of one text the
// norms and logits that export.py's own forward gives; they are computed again. Then the plain
// functions of part 1 must give the very bits of the fast ones of part 4. Enter at check_model. It
// keeps nothing. Calls: file_hash, encode, forward with `watch`.

// How far the reference may be: the logits' root mean square error in units of their spread, and a
// norm's relative error. (It adds floats in another order: SmolLM2 in bf16 is off by 4e-4, 5e-5.)
static const double CHECK_LOGITS = 0.01, CHECK_NORMS = 0.002;

static void check_texts(const Options *o, const Model *m, const Tokenizer *t) {
    Bytes cases = {m->check_cases.data, m->check_cases.data + m->check_cases.cols};
    const uint32_t *stated = bytes_take(&cases, sizeof *stated), n_texts = stated ? *stated : 1;
    for (uint32_t i = 0; i < n_texts; i++) {
        const struct { uint32_t is_chat, len, n; } *head = bytes_take(&cases, sizeof *head);
        const char *s = bytes_take(&cases, head ? ((uint64_t)head->len + 3) / 4 * 4 : 0);
        const int *expected = bytes_take(&cases, head ? 4ull * head->n : 0);
        if (!head || !expected || head->is_chat > 1) die("check failed: damaged stored texts");
        Text text = {s, head->len};
        Prompt prompt = {0};
        Ids ids = {0};
        setenv("SOURCE_DATE_EPOCH", "0", 1);  // a chat of that day
        if (head->is_chat) prompt_turn(&prompt, t, -1, (Text){NULL, 0}, text, USER_AFTER);
        if (head->is_chat) prompt_encode(&prompt, t, true, &ids);
        else encode(t, text, NULL, true, &ids);
        if (ids.n != head->n || (ids.n && memcmp(ids.ids, expected, ids.n * sizeof(int))))
            die("check failed: tokenizer: text %u of the stored ones gives other tokens", i + 1);
        prompt_free(&prompt);
        free(ids.ids);
    }
    if (!o->quiet) fprintf(stderr, "tokenizer: %s, %u texts\n", t->path, n_texts);
}

// Compares the last token's residual stream: check_norms has the embedding's, then each layer's.
static void check_norm(void *worst, const Pass *f, const char *stage) {
    if (strcmp(stage, "embed") && strcmp(stage, "feed_forward_out")) return;
    const float *x = row_of(f->s->x, f->n - 1, f->m->c.dim);
    double norm = sqrt((double)sum16(x, x, f->m->c.dim));
    double expected = (double)vec(&f->m->check_norms)[f->layer + 1];
    double error = fabs(norm - expected) / expected;
    if (!(error <= CHECK_NORMS))
        die("check failed: layer %d: x has norm %g, the reference %g", f->layer, norm, expected);
    *(double *)worst = fmax(*(double *)worst, error);
}

static double check_error(const float *logits, const float *expected, int n) {
    double squares = 0, sum = 0, sum2 = 0;
    for (int i = 0; i < n; i++) {
        double x = (double)expected[i], error = (double)logits[i] - x;
        squares += error * error, sum += x, sum2 += x * x;
    }
    return sqrt(squares / (sum2 - sum * sum / n));
}

static void check_layers(const Options *o, const Model *m) {
    const int *ids = (const void *)m->check_ids.data;
    int n = m->check_ids.cols / (int)sizeof *ids, vocab = m->c.vocab_size;
    if (!n || !m->check_norms.data || !m->check_logits.data) return;
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab) die("check failed: stored token %d is damaged", i);
    Cache kv;
    cache_open(&kv, m, n, 1);
    double worst = 0;
    watch = check_norm, watcher = &worst;
    const float *logits = prefill(m, &kv, 0, ids, 0, n);
    watch = NULL;
    double error = check_error(logits, vec(&m->check_logits), vocab);
    if (!(error <= CHECK_LOGITS)) die("check failed: logits: they are off by %.2g%%", error * 100);
    uint64_t fast = hash64(logits, (size_t)vocab * sizeof(float));
    Matmul *fast_matmul = matmul;
    void (*fast_attention)(const Pass *) = attention;
    matmul = matmul_plain, attention = attention_plain;
    logits = prefill(m, &kv, 0, ids, 0, n);
    matmul = fast_matmul, attention = fast_attention;
    if (hash64(logits, (size_t)vocab * sizeof(float)) != fast)
        die("check failed: this binary's %s code differs from plain C: a compiler's fault?", isa);
    if (!o->quiet) fprintf(stderr, "layers: norms within %.1e, logits within %.1e of reference; "
                           "%s has the bits of plain C\n", worst, error, isa);
    cache_close(&kv);
}

static void check_model(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    if (!m->header) die("%s is a file of llama2.c, which has no reference values to check; "
                        "export.py makes a version 5 of it that has", m->path);
    unsigned long long stated = m->header->content_hash, sum = file_hash(m, m->file_size);
    if (sum != stated) die("check failed: content: %s is damaged: its hash is %016llx, not %016llx",
                           m->path, sum, stated);
    if (!o->quiet) fprintf(stderr, "content: %zu bytes, hash %016llx\n", m->file_size, sum);
    if (t->file && m->check_cases.data) check_texts(o, m, t);
    check_layers(o, m);
    output_write(out, "ok\n", 3);
}
// ---- [5.12] bench -------------------------------------------------------------------------------
// `-m bench`: how fast this machine runs the model, and its memory would let it. Enter at bench.

enum { BENCH_WORDS = 1 << 19, BENCH_ITEMS = 64, BENCH_TEXTS = 16 };  // together 256 MiB

// Reads a part of a memory larger than any cache, at four places in turn: more is then under way.
static void bench_read(void *memory, int item) {
    uint64_t *p = (uint64_t *)memory + (size_t)item * BENCH_WORDS, sums[32] = {0};
    for (size_t i = 0; i < BENCH_WORDS / 4; i += 32)
        for (size_t at = i; at < BENCH_WORDS; at += BENCH_WORDS / 4)
            for (size_t j = 0; j < 32; j++) sums[j] += p[at + j];
    for (int j = 1; j < 32; j++) sums[0] += sums[j];
    *p = sums[0];  // or the compiler could leave all of it out
}

// Tokens per second of n texts, sequences seq, seq + 1, ...: positions from..to, `step` at once.
static double bench_texts(Cache *kv, int seq, int n, int from, int to, int step) {
    Slot batch[MAX_BATCH];
    double start = seconds();
    for (int at = from, end, slots; at < to; at = end) {
        end = at + step < to ? at + step : to, slots = 0;
        for (int i = n * at; i < n * end; i++) {
            int token = (int)(i * 7919LL % 30000 + 5) % kv->m->c.vocab_size;
            batch[slots++] = (Slot){token, i / n, seq + i % n, step == 1 || i / n == to - 1};
        }
        forward(kv->m, kv, batch, slots);
    }
    return n * (to - from) / (seconds() - start);
}

static void bench(const Options *o, const Model *m, const Tokenizer *none, Output *out) {
    int ctx = context_of(o, m), n = ctx < 512 ? ctx : 512, first = (n + 63) / 64, part = n / 4;
    int depth = ctx < 4096 + 64 ? ctx - ctx / 16 : 4096, end = depth + 32 < ctx ? depth + 32 : ctx;
    (void)none;
    Cache kv;
    cache_open(&kv, m, ctx, 1 + BENCH_TEXTS);
    bench_texts(&kv, 0, 1, 0, first, first);
    double startup = seconds() - o->started, start = seconds(), before;
    size_t bytes = sizeof(uint64_t) * BENCH_WORDS * BENCH_ITEMS;
    void *memory = zeros(bytes, 1);
    double stream = 0, decode = 0, prompt = 0, batch = 0;  // the best of some rounds
    for (int round = 0; round < 3 && seconds() - start < 8; round++) {
        for (int i = 0; i < 8; i++) {  // it is short, and so easily disturbed
            before = seconds();
            parallel(bench_read, memory, BENCH_ITEMS);
            stream = fmax(stream, (double)bytes / (seconds() - before));
        }
        decode = fmax(decode, bench_texts(&kv, 0, 1, first, first + part, 1));
        prompt = fmax(prompt, bench_texts(&kv, 0, 1, 0, n, MAX_BATCH));
        for (int seq = 1; seq <= BENCH_TEXTS; seq++) cache_branch(&kv, 0, seq, part);
        bench_texts(&kv, 1, BENCH_TEXTS, part, part + 1, 1);  // copies the page that they share
        batch = fmax(batch, bench_texts(&kv, 1, BENCH_TEXTS, part + 1, part + 1 + n / 16, 1));
    }
    double deep_prompt = bench_texts(&kv, 0, 1, 0, depth, MAX_BATCH);
    double deep_decode = bench_texts(&kv, 0, 1, depth, end, 1);
    // A token reads the whole file but for the embedding, if that is not the classifier too.
    const Matrix *w = &m->token_embedding;
    size_t unread = w->data == m->classifier.data ? 0 : matrix_bytes(w->dtype, w->rows, w->cols);
    for (const Layer *l = m->layers; l < m->layers + m->c.n_layers && m->c.n_experts; l++) {
        const Matrix *of[] = {&l->w_gate, &l->w_up, &l->w_down};
        for (int i = 0; i < 3 && l->router.data; i++)  // nor does it visit all experts
            unread += (size_t)(m->c.n_experts - m->c.n_shared - m->c.n_active) *
                      (of[i]->data ? matrix_bytes(of[i]->dtype, of[i]->rows, of[i]->cols) : 0);
    }
    double weights = (double)(m->file_size - unread), limit = stream / weights;
    const char *name = m->header ? m->header->name : m->path;
    output_print(out, "model: ");
    output_text(out, (Text){name, strlen(name)});
    output_print(out, "\ndtype: %s\nisa: %s\nthreads: %lld\n"
        "weights_mb: %.1f\nstream_gb_s: %.1f\nprefill_tok_s: %.1f\nprefill4096_tok_s: %.1f\n"
        "decode_tok_s: %.1f\ndecode_limit_tok_s: %.1f\ndecode_depth4096_tok_s: %.1f\n"
        "batch16_tok_s: %.1f\nstartup_ms: %.1f\n",
        dtype_names[m->layers[0].wq.dtype], isa, o->threads, weights / 1e6, stream / 1e9, prompt,
        deep_prompt, decode, limit, deep_decode, batch, 1e3 * startup);
    if (!o->quiet) fprintf(stderr, "verdict: %.0f%% of what the memory allows (under 80: other load"
        ", -j, -O3? over 100: caches hold weights); depth4096: %d\n", 100 * decode / limit, depth);
    free(memory);
    cache_close(&kv);
}
// ---- [5.13] each --------------------------------------------------------------------------------
// `--each FILE` runs the prompt for every line of a file, many lines at once: {} in it stands for
// the line. Enter with each_run. It keeps a Machine, whose sequence 0 has the first line's prompt:
// what others have in common with it is branched. A line's answer is that of a run of its own, up
// to its first line break. Calls: start_text, machine_step, given_likelihood.

#ifndef NO_EACH
enum { EACH_AHEAD = 1024 };  // lines that may be under way, or done before their turn

typedef struct {
    Machine w;
    Decoder trunk;           // the first line's prompt
    Decoder all[MAX_SAMPLES];  // of which at_once are used
    Text rest;               // of the file
    long long begun, printed, n_tokens;
    Output answers[EACH_AHEAD];  // those that wait for lines before them have memory
} Each;

// Makes a sequence begin with what the first tokens, up to `most`, have in common with the trunk's.
// Returns how many these are.
static int each_branch(Each *e, const Ids *ids, int most, int seq) {
    Context *c = &e->trunk.c;
    int same = 0;
    for (size_t i = 0; c->ids.n < ids->n && !c->done; i++) push(&c->ids, ids->ids[i]);
    decoder_settle(&e->w, &e->trunk, 1);
    while (same < c->done && same < most && ids->ids[same] == c->ids.ids[same]) same++;
    cache_branch(&e->w.kv, 0, seq, same);
    return same;
}

// With -m eval: a line's log-probability in nats behind what stands before {}, its tokens, and its
// bits per byte.
static void each_measure(Each *e, Decoder *d, int before, size_t bytes) {
    const Ids *ids = &d->c.ids;
    Given g = {.m = e->w.m, .kv = &e->w.kv, .seq = d->seq, .ids = ids->ids, .end = (int)ids->n - 1};
    g.done = each_branch(e, ids, before - 1, d->seq);
    double nats = given_likelihood(&g, before - 1);
    d->n_new = (int)ids->n - before;
    output_print(d->out, "%.6f\t%d\t%.6f", 0 - nats, d->n_new,
                 bytes ? nats / 0.69314718055994531 / (double)bytes : 0.0);
}

// Gives a decoder a line's prompt; in a chat it is the first turn. Where a run of its own would do
// nothing, or the line has no room, the answer is empty.
static void each_begin(Each *e, Decoder *d, Text line) {
    const Machine *w = &e->w;
    const Options *o = w->o;
    Ids *ids = &d->c.ids;
    Prompt p = {0};
    Text prompt = text_fill(o->input, "{}", line);
    Text system = {o->system, o->system ? strlen(o->system) : 0};
    bool chat = !strcmp(o->mode, "chat"), eval = !strcmp(o->mode, "eval");
    if (eval) prompt.len = (size_t)(strstr(o->input.s, "{}") - o->input.s);
    size_t head = chat ? prompt_turn(&p, w->t, -1, system, prompt, USER_AFTER) : 0;
    if (chat) prompt_encode(&p, w->t, true, ids);
    else d->budget = start_text(o, w->m, w->t, prompt, ids);
    if (chat && prompt.len) d->budget = o->steps ? o->steps : w->ctx;
    d->c.keep = chat ? prompt_keep(&p, w->t, head) : (int)fmin((double)ids->n, 4);
    int before = (int)ids->n;
    if (eval) encode(w->t, line, NULL, false, ids);
    if (eval || ids->n > (size_t)w->ctx) d->budget = 0;
    if (ids->n > (size_t)w->ctx) {
        fprintf(stderr, "run: line %lld has %zu tokens with its prompt, too many for the context "
                "of %d: it has no answer\n", d->line, ids->n, w->ctx);
        unfinished = true;
    } else if (eval) each_measure(e, d, before, line.len);
    else if (d->budget) {
        d->c.done = each_branch(e, ids, before - 1, d->seq);
        decoder_begin(w, d, chat ? w->t->chat[USER_AFTER] : prompt);
    }
    prompt_free(&p);
    free((char *)(uintptr_t)prompt.s);
}

// Writes the answers whose turn it is.
static void each_print(Each *e) {
    const Options *o = e->w.o;
    double part = 1 - (double)e->rest.len / (double)o->lines.len;
    for (Output *a; (a = &e->answers[e->printed % EACH_AHEAD])->memory; e->printed++) {
        progress_show(o, 0, 1, 1, "");  // it may be the same terminal
        for (size_t i = 0; i < a->n; i++) output_byte(e->w.out, a->memory[i]);
        output_write(e->w.out, "", 0);  // a whole line at once
        free(a->memory);
        *a = (Output){0};
    }
    progress_show(o, o->started, part, (double)e->n_tokens / part, "tokens");
}

// Ends a line whose answer is complete.
static void each_end(Each *e, Decoder *d) {
    Output *answer = &e->answers[(d->line - 1) % EACH_AHEAD], own = d->own;
    if (!schema_end(&d->schema) && !interrupted) {
        fprintf(stderr, "run: -n ends line %lld before its JSON: it has no answer\n", d->line);
        unfinished = true;
        own.n = 0;
    }
    output_end(&own);
    *answer = own;
    if (e->w.o->quote) {
        *answer = (Output){.fd = -1};
        output_json(answer, (Text){own.memory, own.n - 1});
        output_print(answer, "\n");
        free(own.memory);
    }
    e->n_tokens += d->n_new;
    free(d->c.ids.ids);
    *d = (Decoder){0};
    each_print(e);
}

// Ends a decoder's line, if its answer is complete, and begins the next. Returns whether it did.
static bool each_next(Each *e, Decoder *d) {
    const Options *o = e->w.o;
    if (d->budget > 0) return false;
    if (d->line) each_end(e, d);
    if (!e->rest.len || e->begun == e->printed + EACH_AHEAD) return false;
    if (schema_full(o->compiled)) return false;
    const char *end = memchr(e->rest.s, '\n', e->rest.len);
    Text line = {e->rest.s, end ? (size_t)(end - e->rest.s) : e->rest.len};
    e->rest.s += line.len + (end != NULL);
    e->rest.len -= line.len + (end != NULL);
    line.len -= line.len && line.s[line.len - 1] == '\r';
    if (e->begun++ < o->skip) return e->printed++, true;
    *d = (Decoder){.line = e->begun, .seq = 1 + (int)(d - e->all), .s = e->trunk.s, .out = &d->own,
                   .own = {.fd = -1, .line = !o->quote}};
    d->s.rng += (uint64_t)(d->line - 1) * 0x9E3779B97F4A7C15u;
    each_begin(e, d, line);
    return true;
}

static void each_run(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    size_t n = (size_t)o->at_once;
    Each *e = zeros(1, sizeof *e);
    e->rest = o->lines;
    machine_open(&e->w, &e->trunk, o, m, t, out);
    if (!o->quiet && !o->seed && e->trunk.s.temperature > 0 && strcmp(o->mode, "eval"))
        fprintf(stderr, "seed: %llu\n", e->trunk.seed);
    do {
        for (size_t i = 0; i < n; i++)
            while (!interrupted && each_next(e, &e->all[i])) {}
    } while (machine_step(&e->w, e->all, (int)n));
    progress_show(o, 0, 1, 1, "");
    if (!o->quiet)
        fprintf(stderr, "%lld lines, %.1f tok/s\n", e->printed < o->skip ? 0 : e->printed - o->skip,
                (double)e->n_tokens / (seconds() - o->started));
    for (size_t i = 0; i < n; i++) free(e->all[i].c.ids.ids), free(e->all[i].own.memory);
    for (size_t i = 0; i < EACH_AHEAD; i++) free(e->answers[i].memory);
    machine_close(&e->w, &e->trunk);
    free(e);
}
#endif

// =================================================================================================
// [6] The command line
// =================================================================================================

enum { GENERATE, CHAT, TOKENIZE, LOGITS, EVAL, EXPLAIN, COMPRESS, DECOMPRESS, CHECK, BENCH };
static const struct { const char *name; Mode *run; const char *help; } modes[] = {
    [GENERATE] = {"generate", generate, "continue the prompt (the default)"},
#ifndef NO_CHAT
    [CHAT] = {"chat", chat, "a conversation: -i or -f is the first turn, then lines of stdin"},
#endif
    [TOKENIZE] = {"tokenize", tokenize, "print the prompt's token ids"},
    [LOGITS] = {"logits", write_logits, "read token ids, write float32 [n, vocab_size] of logits"},
    [EVAL] = {"eval", evaluate, "bits per byte, by half overlapping windows of -c tokens (2048)"},
#ifndef NO_EXPLAIN
    [EXPLAIN] = {"explain", explain, "generate, and show why; -o page.html: a page to explore"},
#endif
#ifndef NO_COMPRESS
    [COMPRESS] = {"compress", compress, "write -f, -i or stdin in few bytes: text, or any data"},
    [DECOMPRESS] = {"decompress", compress, "give it back; needs the same model and tokenizer"},
#endif
    [CHECK] = {"check", check_model, "recompute the reference values stored in the model"},
    [BENCH] = {"bench", bench, "measure this machine's speed with the model"},
};
// Sets of modes in which options have a meaning: none where -DNO_... cut the options' room out.
#define VALUE_OF(macro) #macro  // of one that is not defined this is its name
#define DEFINED(macro) (sizeof VALUE_OF(macro) <= sizeof "1")
enum { N_MODES = sizeof modes / sizeof *modes, ALL = (1 << N_MODES) - 1, TEXTS = 1 << GENERATE,
       READS = ALL & ~(1 << CHECK | 1 << BENCH),
       TURNS = !DEFINED(NO_CHAT) << CHAT, SHOW = !DEFINED(NO_EXPLAIN) << EXPLAIN,
       TALK = TEXTS | TURNS, DRAW = TALK | SHOW, MIXED = !DEFINED(NO_ENSEMBLE) * TEXTS,
       PROBS = TALK | 1 << EVAL, EACH = !DEFINED(NO_EACH) * PROBS,
       FITS = !DEFINED(NO_SCHEMA) * (TALK | 1 << EVAL),
       KEPT = !DEFINED(NO_SESSIONS) * (TALK | 1 << LOGITS), TOOLS = !DEFINED(NO_TOOLS) * TALK };

// One table parses, checks and explains the options. The type of the field says what one can be.
enum { FLAG, WORD, LIST, INTEGER, DECIMAL };
#define TO(field) offsetof(Options, field), _Generic(((Options *)0)->field, bool: FLAG,            \
    const char *: WORD, List: LIST, double: DECIMAL, default: INTEGER)
static const struct Option {
    const char *name;  // and behind it its argument
    size_t field;      // where in Options its value goes
    int kind;
    double low, high;  // of a number; of a word, low is 1 if it cannot be empty
    int modes;         // in which it has a meaning
    const char *help;
} options[] = {
    {"-i, --prompt TEXT", TO(prompt), 0, 0, READS, "the text to begin with; - reads it from stdin"},
    {"-f, --file PATH", TO(prompt_file), 1, 0, READS, "read that text from a file; - is stdin"},
    {"-o, --output PATH", TO(output), 1, 0, ALL, "write there instead of to stdout"},
    {"-n, --steps N", TO(steps), 0, 1e9, DRAW, "most new tokens (256, chat 1024); 0: to its end"},
    {"-m, --mode MODE", TO(mode), 1, 0, ALL, "what to do, see below"},
    {"-t, --temperature T", TO(temperature), 0, 1e9, DRAW, "0: likeliest; more: bolder (1)"},
    {"-p, --top-p P", TO(top_p), 0, 1, DRAW, "draw from the likeliest tokens, P in sum (0.9)"},
    {"-s, --seed N", TO(seed), 0, 0x1p64, ALL, "makes a run repeatable; 0 (default): the clock"},
    {"-z, --tokenizer PATH", TO(tokenizer), 1, 0, ALL, "its file (MODEL's .tok, or tokenizer.bin)"},
    {"-c, --context N", TO(context), 0, 1 << 24, ALL, "tokens to make room for (the model's most)"},
    {"-j, --threads N", TO(threads), 1, 256, ALL, "threads (the processors that it may use)"},
    {"-y, --system TEXT", TO(system), 0, 0, TURNS, "tells the model in a chat how to answer"},
    {"-k, --samples N", TO(samples), 1, MAX_SAMPLES, TALK, "write N different texts at once"},
    {"-b, --best", TO(best), 0, 0, TALK, "with -k: print only the text that is likeliest"},
    {"    --reward MODEL", TO(reward), 1, 0, TALK, "with -k or -e: a reward model finds the best"},
    {"-e, --ensemble MODEL", TO(others), 1, 0, MIXED, "answers, too: the best one is printed"},
    {"-d, --draft MODEL", TO(draft), 1, 0, TALK, "faster: a small model, or lookup, guesses"},
    {"-S, --session FILE", TO(session), 1, 0, KEPT, "keep the text in FILE, or go on with it"},
    {"-T, --tool CMD", TO(tool), 1, 0, TOOLS, "answers arithmetic and tool calls on its stdin"},
    {"    --each FILE", TO(each), 1, 0, EACH, "run the prompt for each line, in the place of {}"},
    {"    --at-once N", TO(at_once), 1, MAX_SAMPLES, EACH, "with --each: how many together (16)"},
    {"    --skip N", TO(skip), 0, 1e15, EACH, "with --each: without the first N lines"},
    {"    --quote", TO(quote), 0, 0, EACH & TALK, "with --each: whole answers, as strings of JSON"},
    {"    --suffix TEXT", TO(suffix), 0, 0, TEXTS, "write what is between -i and TEXT, alone"},
    {"    --schema SCHEMA", TO(schema), 1, 0, FITS, "write JSON that fits it: a file, or {...}"},
    {"    --json", TO(json), 0, 0, FITS, "write any JSON value"},
    {"    --indent N", TO(indent), 0, 16, FITS, "JSON in lines, each level indented by N spaces"},
    {"    --logprobs N", TO(logprobs), 0, 1 << 24, PROBS, "instead: JSON, tokens and N likeliest"},
    {"    --stop TEXT", TO(stops), 1, 0, DRAW, "the model's text ends before TEXT (several times)"},
    {"    --think", TO(think), 0, 0, TALK, "keep <think> ... </think> where stdout is no terminal"},
    {"-q, --quiet", TO(quiet), 0, 0, ALL, "no statistics and no progress on stderr"},
    {"    --top-k K", TO(top_k), 0, 1 << 24, ALL, "draw from the K likeliest tokens; 0: from all"},
    {"    --min-p P", TO(min_p), 0, 1, ALL, "from those at least P times as likely as the first"},
    {"    --repeat-penalty R", TO(repeat_penalty), 1e-3, 1e3, ALL, "over 1: repeat less (1: off)"},
    {"    --repeat-last N", TO(repeat_last), 0, 1 << 24, ALL, "which counts N tokens (64); 0: all"},
    {"    --dry M", TO(dry), 0, 1e3, ALL, "against repeating passages: 0.8 is usual (0: off)"},
    {"    --receipt", TO(receipt), 0, 0, TALK, "print a hash of all logits that were sampled from"},
    {"    --layer L", TO(layer), 0, MAX_LAYERS - 1, SHOW, "explain: attention of layer 0, 1, ..."},
    {"    --head H", TO(head), 0, 1 << 14, SHOW, "explain: ... and of its head 0, 1, ..."},
    {"    --trace", TO(trace), 0, 0, SHOW, "explain: each stage of the computation in numbers"},
    {"-h, --help", TO(help), 0, 0, ALL, "this text"},
    {"-V, --version", TO(version), 0, 0, ALL, "version and instruction set"},
    {"    --manual", TO(manual), 0, 0, ALL, "this as a manual page, for man or mandoc"},
    {"    --completion SHELL", TO(completion), 1, 0, ALL, "completions for bash, zsh or fish"},
};
enum { N_OPTIONS = sizeof options / sizeof *options };
static __attribute__((noreturn, format(printf, 1, 2))) void usage_error(const char *format, ...) {
    char line[2 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    tell("%s; see ./run --help", line);
    exit(2);
}

// Sets an option to the value s (NULL: there is none); `a` is how it was given.
static void option_set(Options *o, const struct Option *option, const char *a, const char *s) {
    void *field = (char *)o + option->field;
    bool flag = option->kind == FLAG, empty = option->kind == WORD && option->low < 1;
    char *end = NULL;
    if (flag ? s != NULL : !s || (!*s && !empty))
        usage_error("%s %s value", a, flag ? "takes no" : "needs a");
    List *list = option->kind == LIST ? field : NULL;
    if (list && list->n == MAX_LIST) usage_error("%s is given too often", a);
    o->given |= 1ull << (option - options);
    if (option->kind == FLAG) *(bool *)field = true;
    if (option->kind == WORD) *(const char **)field = s;
    if (list) list->of[list->n++] = s;
    if (option->kind < INTEGER) return;
    double number = strtod(s, &end);
    errno = 0;
    if (option->kind == INTEGER) *(unsigned long long *)field = strtoull(s, &end, 10);
    else *(double *)field = number;
    if (!(number >= option->low && number <= option->high) || errno || *end || s[0] <= ' ')
        usage_error("%s goes from %.10g to %.10g, not \"%.40s\"", a, option->low, option->high, s);
}

static const struct Option *option_find(const char *name, size_t n, size_t at) {
    for (const struct Option *option = options; option < options + N_OPTIONS; option++)
        if (option->modes && n && n == strcspn(option->name + at, ", ") &&
            !strncmp(option->name + at, name, n)) return option;
    return NULL;
}

// Ends the program: an option is not known. One that begins alike may be meant, as -V by -v.
static __attribute__((noreturn)) void option_unknown(const char *a) {
    const char *like = "";
    size_t most = a[1] == '-' ? 4 : 1, same;
    for (const struct Option *option = options; option < options + N_OPTIONS; option++) {
        const char *name = option->name + (a[1] == '-' ? 4 : 0);
        for (same = 0; name[same] && tolower(name[same]) == tolower(a[same]);) same++;
        if (option->modes && same > most) like = name, most = same;
    }
    usage_error("unknown option %s%s%.*s", a, *like ? ": there is " : "",
                (int)strcspn(like, ", "), like);
}

// Options are given as -x, --name or --name=value; -n5 is -n 5, and -qb is -q -b. -- ends them.
static void option_parse(Options *o, int argc, char **argv) {
    bool ended = false;
    for (int i = 1; i < argc; i++) {
        char *a = argv[i], name[3] = "-";
        name[1] = *(*a ? a + 1 : a);
        bool given = !ended && a[0] == '-' && a[1], word = given && a[1] == '-';
        if (word && !a[2]) ended = true;
        if (word && !a[2]) continue;
        if (!given && o->model)
            usage_error("there are two models, %s and %s (-i is a text, -m a mode)", o->model, a);
        if (!given) o->model = a;
        size_t n = given ? strcspn(a, "=") : 0;
        const struct Option *option = word ? option_find(a, n, 4) : option_find(name, 2, 0);
        if (given && !option) option_unknown(a);
        bool flag = given && option->kind == FLAG;
        char *value = word && a[n] ? a + n + 1 : given && !word && a[2] ? a + 2 : NULL;
        if (flag && !word && value) a[1] = '-', argv[i--] = a + 1, value = NULL;
        if (given && !flag && !value) value = argv[++i];
        if (given) option_set(o, option, word ? a : name, value);
    }
}

// Returns the mode. Options that have no meaning in it, or together, are refused.
static int option_check(const Options *o) {
    int mode = 0;
    while (mode < N_MODES && (!modes[mode].name || strcmp(o->mode, modes[mode].name))) mode++;
    if (mode == N_MODES) usage_error("unknown mode %s", o->mode);
    for (int i = 0; i < N_OPTIONS; i++) {
        const char *name = options[i].name + strspn(options[i].name, " ");
        if (o->given >> i & 1 && !(options[i].modes >> mode & 1))
            usage_error("%.*s means nothing in mode %s", (int)strcspn(name, ", "), name, o->mode);
    }
    bool k = o->samples > 1, layer = o->layer >= 0;
    if (o->prompt && o->prompt_file) usage_error("-i and -f cannot be used together");
    if (o->others.n && (k || o->draft || o->session || o->receipt))
        usage_error("-e cannot be used with -k, -d, -S or --receipt");
    if (k && o->draft) usage_error("-k and -d cannot be used together");
    if (o->reward && !k && !o->others.n) usage_error("--reward ranks answers: it needs -k or -e");
    if (o->suffix && (o->session || o->others.n)) usage_error("--suffix goes without -S and -e");
    if (o->best && !k) usage_error("-b picks the best of several samples: it needs -k");
    if (k && mode == CHAT && !o->best) usage_error("-k in a chat needs -b");
    if (o->head >= 0 && !layer) usage_error("--head needs --layer");
    if (o->each && (k || o->draft || o->others.n || o->session || o->tool || o->receipt))
        usage_error("--each cannot be used with -k, -d, -e, -S, -T or --receipt");
    if (o->logprobs >= 0 && (k || o->each || o->others.n || o->tool || o->stops.n))
        usage_error("--logprobs cannot be used with -k, -e, -T, --each or --stop");
    bool fits = o->schema || o->json;
    if (fits && (o->others.n || o->tool || o->stops.n || (o->schema && o->json)))
        usage_error("--schema and --json cannot be used together, nor with -e, -T or --stop");
    if (o->indent && (!fits || o->each))
        usage_error("--indent needs --schema or --json, and goes without --each");
    if (!o->each && (o->quote || o->skip || o->at_once != 16))
        usage_error("--at-once, --skip and --quote need --each");
    if (o->each && !strcmp(o->each, "-") && o->prompt_file && !strcmp(o->prompt_file, "-"))
        usage_error("stdin cannot be both the prompt and the lines of --each");
    if (layer && o->output && !o->trace) usage_error("--layer means nothing in a page: it has all");
    if ((mode == COMPRESS || mode == LOGITS) && !o->output && isatty(1))
        usage_error("mode %s writes no text for a terminal: use -o or a pipe", o->mode);
    return mode;
}

// An output that is also an input would be lost: it is refused.
static void refuse_overwriting(const Options *o, const Tokenizer *t) {
    const char *inputs[9 + MAX_LIST] = {o->model, t->path, o->prompt_file, o->session, o->draft,
                                        o->each, o->reward, o->schema, "/dev/stdin"};
    memcpy(inputs + 9, o->others.of, sizeof o->others.of);
    for (int i = 0; i < 9 + MAX_LIST; i++)
        if (same_file(o->output, inputs[i]))
            usage_error("-o %s would overwrite %s, an input", o->output, inputs[i]);
}

static void option_help(bool manual) {  // or the same as a manual page, in the macros of mdoc
    const char *line = manual ? "%s\n        %s\n" : "  %-26s %s\n";
    puts(manual ? ".Dd December 1, 2026\n.Dt RUN 1\n.Os\n.Sh NAME\n.Nm run\n.Nd a language model\n"
                  ".Sh SYNOPSIS\n.Nm\n.Ar MODEL\n.Op Ar options\n.Sh DESCRIPTION\n.Bd -literal"
                : "usage: ./run MODEL [options]\n\nContinues a text, or does what --mode says.\n");
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].modes) printf(line, options[i].name, options[i].help);
    puts("\nTokens are drawn in this order: repeat-penalty, dry, temperature, top-k, top-p, min-p."
         "\n\nmodes:");
    for (int i = 0; i < N_MODES; i++)
        if (modes[i].name) printf("  %-10s %s\n", modes[i].name, modes[i].help);
    printf("\nexit status: 0 done, 1 something went wrong, 2 wrong command line, 130 stopped\n\n"
           "  ./run model.bin -i \"Once upon a time\"      # a text\n"
           "  ./run model.bin -m chat                    # a conversation\n"
           "  ./run model.bin -m explain -i \"Once\" -n 3  # why?\n%s", manual ? ".Ed\n" : "");
}

// What a shell completes: options, modes, and files where there is a value.
static void option_completion(const char *shell) {
    bool bash = !strcmp(shell, "bash"), zsh = !strcmp(shell, "zsh"), fish = !strcmp(shell, "fish");
    if (!bash && !zsh && !fish) usage_error("--completion is for bash, zsh or fish, not %s", shell);
    fputs(bash ? "complete -o filenames -f -W \"" : zsh ? "#compdef run\nlocal modes=\""
                                                        : "set -l modes \"", stdout);
    for (int i = 0; i < N_MODES; i++) if (modes[i].name) printf("%s ", modes[i].name);
    puts(bash ? "" : zsh ? "\"\n_arguments -s 1:MODEL:_files \\" : "\"");
    for (const struct Option *o = options; o < options + N_OPTIONS; o++) {
        const char *word = o->name + 4, *value = strchr(word, ' '), *help = o->help;
        bool brief = *o->name == '-', mode = value && !strcmp(value, " MODE");
        const char *in_zsh = mode ? ":mode:($modes)" : value ? ":value:_files" : "";
        const char *in_fish = mode ? "-xa \"$modes\"" : value ? "-r" : "";
        int n = (int)strcspn(word, " ");
        if (bash) printf("%.2s %.*s\n", o->name, n, word);
        if (zsh && brief) printf("\"*%.2s%s[%s]%s\" \\\n", o->name, value ? "+" : "", help, in_zsh);
        if (zsh) printf("\"*%.*s%s[%s]%s\" \\\n", n, word, value ? "=" : "", help, in_zsh);
        if (fish) printf("complete -c run -l %.*s %s%.*s %s -d \"%s\"\n", n - 2, word + 2,
                         brief ? "-s " : "", brief, o->name + 1, in_fish, help);
    }
    puts(bash ? "\" run" : "");
}

static void on_signal(int number) {
    static const char line[] = "run: a mapped file became shorter, or cannot be read any more\n";
    static atomic_flag told = ATOMIC_FLAG_INIT;
    bool lost = number == SIGBUS;
    if (number == SIGCONT && terminal_raw) terminal_raw = 2, terminal_set(true);
    if (number == SIGCONT) return;
    while (lost && atomic_flag_test_and_set(&told)) pause();  // another thread says it
    if (lost && write(2, line, sizeof line - 1) < 0) {}
    if (lost || interrupted || idle) {
        output_leave();
        _exit(lost ? 1 : 130);
    }
    interrupted = number == SIGINT ? SIGINT : SIGTERM;  // after which no read shall wait:
    if (interrupted == SIGTERM) terminal_set(false), dup2(open("/dev/null", O_RDONLY), 0);
}
static void catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal};  // without SA_RESTART: a read ends
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCONT, on_signal);  // after Ctrl-Z a terminal has the shell's modes; reads go on
    signal(SIGXFSZ, SIG_IGN);  // a file that must not grow is an error of write
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGQUIT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (signal(SIGHUP, SIG_IGN) != SIG_IGN) sigaction(SIGHUP, &action, NULL);  // but under nohup
    atexit(output_leave);
}

// A binary built for another machine's instructions says so instead of dying of an illegal one. It
// runs before anything else, and is itself compiled for the oldest machine.
#if defined __x86_64__ && !defined PLAIN && !defined main
#define HAS(macro, name) (!DEFINED(macro) || __builtin_cpu_supports(name))
__attribute__((constructor, target("arch=x86-64"))) static void check_cpu(void) {
    __builtin_cpu_init();
    if (HAS(__AVX2__, "avx2") && HAS(__AVX512VL__, "avx512vl") &&
        HAS(__AVX512VNNI__, "avx512vnni") && HAS(__AVX512VBMI__, "avx512vbmi")) return;
    fputs("run: built for a newer processor: build it here, or with ARCH=x86-64\n", stderr);
    _exit(1);
}
#endif

#ifdef PORTABLE
// `make portable` compiles this file for several kinds of processors, each but the oldest with a
// main of another name, and links them. Which one runs: the best that this processor can, or
// RUN_ISA. NULL: the oldest kind.
typedef int Main(int argc, char **argv);
typedef struct { const char *name; Main *run; bool can; } Kind;
Main run_avx512vnni, run_avxvnni, run_avx2, run_dotprod;
static Main *portable_main(void) {
#ifdef __x86_64__
    uint32_t a = 0, b = 0, c = 0, d = 0;
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
    bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    const Kind kinds[] = {
        {"avx512vnni", run_avx512vnni, vnni},
        {"avxvnni", run_avxvnni, avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1},
        {"avx2", run_avx2, avx2}, {"baseline", NULL, true}};
#else
    const Kind kinds[] = {{"dotprod", run_dotprod, getauxval(AT_HWCAP) >> 20 & 1},  // ASIMDDP
                          {"baseline", NULL, true}};
#endif
    const char *wanted = getenv("RUN_ISA");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].can && (!wanted || !strcmp(wanted, kinds[i].name))) return kinds[i].run;
    usage_error("RUN_ISA=%s: this program or this processor has no such kind", wanted);
    return NULL;
}
#endif

// How many processors the program may use: those of its affinity mask, within its group's quota.
static int processors(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    char line[64] = "", *end;
    cpu_set_t mask;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (!sched_getaffinity(0, sizeof mask, &mask)) n = CPU_COUNT(&mask);
    long quota = f && fgets(line, sizeof line, f) ? strtol(line, &end, 10) : 0;  // "max": 0
    long period = quota > 0 ? strtol(end, NULL, 10) : 0;
    if (period > 0 && quota / period < n) n = quota / period;
    if (f) fclose(f);
#endif
    return n < 1 ? 1 : n > 256 ? 256 : (int)n;
}

// Reads the prompt and the lines of --each. What a model that fills in reads is a form of the
// tokenizer's file: the prompt is in the place of {}, what follows the gap in that of a byte 1.
static void input_open(Options *o, const Tokenizer *t, bool is_prompt) {
    Text *in = &o->input, form = t->chat[FILL];
    *in = input_read(o->prompt_file, o->prompt, is_prompt);
    o->lines = input_read(o->each, NULL, false);
    if (is_prompt && o->prompt_file && in->len && in->s[in->len - 1] == '\n')
        in->len--;  // the end of a file's last line is no part of a prompt
    if (o->suffix) {
        if (!form.len) die("%s has no tokens for --suffix: its model cannot fill in", t->path);
        Text half = text_fill(form, "{}", *in), suffix = {o->suffix, strlen(o->suffix)};
        free((char *)(uintptr_t)in->s);
        *in = text_fill(half, "\1", suffix);
        free((char *)(uintptr_t)half.s);
    }
    const char *mark = o->each ? strstr(in->s, "{}") : NULL;
    if (o->each && !mark) usage_error("the prompt has no {} for the lines of --each");
    if (mark && !strcmp(o->mode, "eval") && mark[2 + strspn(mark + 2, "\r\n")])
        usage_error("with -m eval {} ends the prompt: what follows it is not measured");
}

// What this build and the process that it runs in must be like.
static void check_process(void) {
    for (int fd = 0; fd <= 2; fd++)  // a closed one must not become a file that we open
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
        else fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    volatile float a = 1 + 0x1p-12f, square = 1 + 0x1p-11f, tiny = FLT_MIN;
    if (a * a - square != 0 || tiny / 2 == 0)  // the same bits everywhere need these
        die("built for other arithmetic: use -ffp-contract=off and no -ffast-math");
}

// Prints what needs no model. Returns whether it was asked for.
static bool option_tell(const Options *o) {
    if (o->help || o->manual) option_help(o->manual);
    else if (o->completion) option_completion(o->completion);
    else if (o->version) printf("run %s (%s)\n", VERSION, isa);
    if (fflush(stdout)) die("cannot write stdout: %s", strerror(errno));
    return o->help || o->manual || o->completion || o->version;
}

// Sets what depends on the mode, unless it is given.
static void option_settle(Options *o, int mode) {
    if (o->steps < 0) o->steps = mode == CHAT ? 1024 : mode == EVAL ? 0 : 256;
    if (o->each && !o->prompt && !o->prompt_file) o->prompt = "{}";
    if (mode == LOGITS) o->temperature = 0;  // nothing is drawn: there is no seed to tell
    bool written = o->prompt || o->prompt_file || o->session || o->each;
    bool text = mode != CHAT && mode != CHECK && mode != BENCH && !isatty(0);
    bool reads = text || mode == COMPRESS || mode == DECOMPRESS;
    if (o->prompt ? !strcmp(o->prompt, "-") : reads && !written) o->prompt_file = "-";
#ifndef NO_SCHEMA
    if (o->schema || o->json) o->compiled = schema_open(o);
#endif
}

int main(int argc, char **argv) {
#ifdef PORTABLE
    Main *better = portable_main();
    if (better) return better(argc, argv);
#endif
    Options o = {.mode = "generate", .steps = -1, .temperature = -1, .top_p = -1,
                 .top_k = -1, .min_p = -1, .repeat_penalty = -1, .repeat_last = 64, .layer = -1,
                 .head = -1, .at_once = 16, .logprobs = -1, .started = seconds(),
                 .threads = processors(), .words = argv};
    check_process();
    option_parse(&o, argc, argv);
    if (option_tell(&o)) return 0;
    if (!o.model || !*o.model) usage_error("no model is named; `make demo` fetches model.bin");
    int mode = option_check(&o);
    option_settle(&o, mode);
    catch_signals();
    start_threads((int)o.threads);
    Model m;
    Tokenizer t = {0};
    load_model(&m, o.model);
    if (mode != LOGITS && mode != BENCH && (mode != CHECK || tokenizer_hash_of(&m)))
        find_tokenizer(&t, o.tokenizer, &m);
    refuse_overwriting(&o, &t);
    Output out = output_open(o.output);
    out.mute = o.logprobs >= 0;
    input_open(&o, &t, DRAW >> mode & 1);  // which may wait for long
    idle = mode == CHECK || mode == BENCH;  // others end well after a signal
    Mode *run = modes[mode].run;
#ifndef NO_EACH
    if (o.each) run = each_run;
#endif
#ifndef NO_ENSEMBLE
    if (o.others.n) run = ensemble;
#endif
    run(&o, &m, &t, &out);
    output_write(&out, "", 0);
    refuse_overwriting(&o, &t);  // a session may have been made only now
    bool part = out.n && mode != LOGITS && !o.each;  // what was interrupted may be worth keeping
    if (!interrupted || part) output_file(&out, out.n ? out.memory : "");
    free(out.memory);
    free((char *)(uintptr_t)o.input.s);
    free((char *)(uintptr_t)o.lines.s);
    if (o.compiled) schema_close(o.compiled);
    free_tokenizer(&t);
    free_model(&m);
    return interrupted ? 130 : unfinished;
}

/* run.c - a language model in one C file.
 *
 * A language model is two files: this program and its parameters. Given the tokens of a text so
 * far, the model gives every token of its vocabulary a score (a logit) for being the next one. We
 * turn the scores into probabilities, draw a token, append it, and ask again. That is all it does.
 *
 *     Part 1  The model         checkpoint, mathematics, KV cache, forward, sampler
 *     Part 2  The tokenizer     text <-> tokens
 *     Part 3  Speed             the same mathematics for SIMD units and threads: same bits, sooner
 *     Part 4  What to do with it   the modes: generate, chat, explain, eval, compress, check ...
 *     Part 5  The command line
 *
 * The same bytes everywhere: for one model file and one token sequence the logits are bit-identical
 * whatever the thread count, the cutting into batches, the instruction set, the compiler. Every sum
 * has a fixed order, multiplications and additions are never fused (SSE2 has no fused operation,
 * and Zen 4 does one multiply and one add per cycle in the time of one fused operation), and
 * functions such as exp are written here from basic operations, since C libraries differ in their
 * last bits.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // MAP_ANONYMOUS, MAP_NORESERVE, madvise
#endif
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif
#include <setjmp.h>
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
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define VERSION "1.0"

// (16 is 0 on machines that have half-precision arithmetic as well.)
#if defined __FAST_MATH__ || (FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16)
#error "run.c needs IEEE float32 arithmetic: no -ffast-math; on 32-bit x86 add -msse2 -mfpmath=sse"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "run.c reads little-endian files in place: this machine is big-endian"
#endif

// =================================================================================================
// Part 1. The model
// =================================================================================================
//
// How the next token comes about, with the shapes of what is computed (in the default model: dim
// 576, 30 layers, 9 query heads and 3 key/value heads of head_dim 64, vocab_size 49152):
//
//     token                                    a number that stands for a piece of text
//     x (dim) = its row of the embedding       what the token means, as a vector
//     in each layer:
//         xb = norm(x)
//         q, k, v = wq xb, wk xb, wv xb        query, key and value, for each head (head_dim)
//         x += wo attention(q, k, v)           tokens talk: each looks back at those before it
//         xb = norm(x)
//         x += w_down (act(w_gate xb) * w_up xb)   feed-forward: each token thinks by itself
//     logits (vocab_size) = classifier norm(x) a score for every token of the vocabulary
//     next token                               drawn by lot with probabilities softmax(logits)
//
// x is the residual stream. A layer does not replace it but adds to it: what the layers before it
// wrote stays readable, and each one has only to learn what is still missing.
//
// All that a model knows is in its matrices. They began as random numbers. Training showed it text,
// and for each token moved every number a little to where the token that really came next would
// have been likelier, again and again. What the layers do with a text was learned in this way, and
// written by nobody; this part is only the frame.
//
// What comes under "Details" can wait: number formats, memory, how checkpoints lie in files.

static __attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...);
static void *resize(void *old, size_t count, size_t size);  // realloc that does not return NULL

// ---- The parameters. A checkpoint is a file with the sizes in front and the matrices behind. To
// load it is to map it into memory and to note where each matrix begins: load_model, in Details.

enum {          // how the numbers of a matrix are stored; weight(), in Details, reads them all
    Q8V = -2,   // w = scale * q, a scale for each column: only values in the KV cache
    HALF = -1,  // half precision: only in the KV cache, in no file
    ROWS,       // float32, row by row: vectors, and llama2.c's files
    F32,        // float32, but 16 rows side by side, as all that follow
    BF16,       // the upper half of a float32
    Q8,         // w = scale * q, q = -127..127, a scale for each 32 numbers of a row
    Q4,         // w = scale * q, q = -8..7
    Q4A,        // w = scale * q + minimum, q = 0..15
    BYTES,      // not a matrix: bytes
    N_DTYPES
};
typedef struct { int dtype, rows, cols; const uint8_t *data; } Matrix;

typedef struct {             // the first 256 bytes of a version 3 checkpoint
    uint32_t magic;          // 0x616b3432, "ak42" as in llama2.c
    int32_t version;         // 3
    int32_t dim;             // width of the residual stream
    int32_t hidden_dim;      // width of the feed-forward layer
    int32_t n_layers;
    int32_t n_heads;         // query heads
    int32_t n_kv_heads;      // key/value heads; n_heads / n_kv_heads query heads share one
    int32_t vocab_size;
    int32_t seq_len;         // longest context the model was made for
    int32_t head_dim;        // width of a head
    float norm_eps;
    uint32_t flags;          // below
    int32_t activation;      // 0 SiLU, 1 GELU (tanh form)
    float embed_scale;       // the embedding is multiplied by it
    float attn_scale;        // query times key is multiplied by it: 1 / sqrt(head_dim)
    int32_t sliding_window;  // local layers see this many positions, themselves included; 0: all
    uint8_t local_layers[32];      // bit l: layer l is local
    uint64_t tokenizer_hash;       // fingerprint of the tokenizer; 0: none
    uint64_t content_hash;         // of the whole file, with both hashes taken as zero
    uint64_t file_size;
    uint32_t dtype, n_tensors;
    uint8_t zero[48];
    char name[64];
    uint8_t zero2[8];
    uint64_t header_hash;    // of header and directory, with both hashes taken as zero
} Config;
_Static_assert(sizeof(Config) == 256, "the checkpoint's header has 256 bytes");
enum { TIED_EMBEDDING = 1, QKV_BIAS = 2, QK_NORM = 4, SANDWICH_NORM = 8, LOCAL_ROPE = 16,
       ALL_FLAGS = 31 };
enum { MAX_LAYERS = 256 };

// What only some families of models have is NULL (its data) in the others.
typedef struct {
    Matrix attn_norm;       // (dim)
    Matrix wq;              // (n_heads * head_dim, dim)
    Matrix wk, wv;          // (n_kv_heads * head_dim, dim)
    Matrix bq, bk, bv;      // biases of the three (Qwen2)
    Matrix q_norm, k_norm;  // (head_dim), of each query and key (Qwen3, Gemma 3)
    Matrix wo;              // (dim, n_heads * head_dim)
    Matrix post_attn_norm;  // (dim) (Gemma 3)
    Matrix ffn_norm;        // (dim)
    Matrix w_gate, w_up;    // (hidden_dim, dim)
    Matrix w_down;          // (dim, hidden_dim)
    Matrix post_ffn_norm;   // (dim) (Gemma 3)
} Layer;

typedef struct {
    Config c;
    Matrix rope_freqs[2];    // (head_dim / 2) inverse frequencies of global and of local layers
    Matrix token_embedding;  // (vocab_size, dim)
    Layer *layers;           // (n_layers)
    Matrix final_norm;       // (dim)
    Matrix classifier;       // (vocab_size, dim); the token embedding again where they are tied
    Matrix check_ids, check_norms, check_logits, check_cases;  // reference values for -m check
    const char *path;
    const uint8_t *file;     // the mapped file
    size_t file_size;
    float *own_freqs;        // inverse frequencies of llama2.c's files, which do not hold them
} Model;

static const float *floats(const void *p) { return p; }
static const uint16_t *halves(const void *p) { return p; }
static const float *vec(const Matrix *w) { return floats(w->data); }
static bool is_local(const Config *c, int layer) {
    return c->sliding_window && c->local_layers[layer / 8] >> layer % 8 & 1;
}

// ---- The mathematics: five functions. Part 3 has faster versions of rows_plain and, below, of
// attend_plain, with equal results. The functions declared here are in Details.

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline float exp_(float x);                             // e^x
static void exp_all(float *x, int n, float minus);             // x[i] = e^(x[i] - minus)
static void cos_sin(double x, float *cosine, float *sine);
static inline float sum16(const float *x, const float *y, int first, int n);  // of x y, or of x
static float largest(const float *x, int first, int n);
static float weight(const Matrix *w, int r, int c);            // the parameter w[r][c]

// Activations rounded to int8 by blocks of 32, x = d * q, for quantized weights and keys: within a
// block the products are then of integers. See quantize.
typedef struct {
    int8_t *q;        // (blocks, 32)
    float *d;         // (blocks) scale
    float *dsum;      // (blocks) d * sum of q, for weights with a minimum
    int32_t *minus8;  // (blocks) -8 * sum of q, for weights with an offset of 8
    int n_blocks;     // of one token
} Quantized;
static float quantized_row(const Matrix *w, int r, const Quantized *x, int token);
static void quantize(Quantized *out, int token, const float *x, int n);
static Quantized new_quantized(int n, int cols);               // for n tokens; free(x.q) frees it
static Quantized from_token(Quantized x, int token);           // the tokens from a multiple of 8 on

// 1. The matrix product, y = W x: y[r] = sum over c of w[r][c] * x[c]. A row of W says how much of
// each number of x goes into one number of y. Nearly all parameters and all time are here. The
// second function does some rows of W for n inputs, which are x_stride and stride numbers apart.
static float row_times(const Matrix *w, int r, const float *x, const Quantized *xq, int t) {
    if (w->dtype >= Q8) return quantized_row(w, r, xq, t);
    float sum = 0;
    for (int c = 0; c < w->cols; c++) sum += weight(w, r, c) * x[c];
    return sum;
}
static void rows_plain(const Matrix *w, int first, int rows, const float *x, int x_stride,
                       const Quantized *xq, int n, float *y, int stride) {
    for (int t = 0; t < n; t++, x += x_stride, y += stride)
        for (int r = 0; r < rows; r++) y[r] = row_times(w, first + r, x, xq, t);
}

// 2. RMSNorm (arXiv:1910.07467): out[i] = w[i] * x[i] / sqrt(mean of x^2 + eps). It brings a vector
// to a standard length, whatever the layers have added up, and weights each number. out may be x.
static void rmsnorm(float *out, const float *x, const float *w, int n, float eps) {
    float scale = 1.0f / sqrtf(sum16(x, x, 0, n) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = w[i] * (scale * x[i]);
}

// 3. Softmax of x[first..n) turns scores into positive weights that add up to 1:
//     x[i] = e^(x[i] - max) / sum over j of e^(x[j] - max)
// A score that is larger by 1 weighs e = 2.7 times as much. To subtract the maximum changes nothing
// in the quotient, but e^x of a large x would overflow. Scores of [gap, end) do not count: they get
// weight 0.
static void softmax_without(float *x, int first, int gap, int end, int n) {
    for (int i = gap; i < end; i++) x[i] = x[n - 1];  // the maximum stays
    float max = largest(x, first, n);
    exp_all(x + first, n - first, max);
    for (int i = gap; i < end; i++) x[i] = 0;
    float scale = 1.0f / sum16(x, NULL, first, n);
    for (int i = first; i < n; i++) x[i] *= scale;
}
static void softmax(float *x, int first, int n) { softmax_without(x, first, first, first, n); }

// 4. RoPE (arXiv:2104.09864), rotary positions. Attention is an average over tokens, and does not
// see their order: "dog bites man" would be "man bites dog". So each pair (a, b) of numbers of a
// query or key is turned, as the hand of a clock, by an angle that grows with the token's position:
//     angle = pos * freq[j],  freq[j] = theta^(-2j / head_dim)   for pair j
//     (a, b) becomes (a cos - b sin, b cos + a sin)
// The product of a query and a key then depends on how far apart they are. The first pair turns by
// 1 radian per position, the last hardly: theta, 10000 or more, sets how far it can tell distances.
// Checkpoints hold the frequencies. The table has cos, cos, ... and -sin, sin, ... for a head.
static void rope_angles(float *table, const float *freq, int pos, int head_dim) {
    float *cosine = table, *sine = table + head_dim;
    for (int i = 0; i < head_dim; i += 2) {
        cos_sin((float)pos * freq[i / 2], &cosine[i], &sine[i + 1]);
        cosine[i + 1] = cosine[i];
        sine[i] = -sine[i + 1];
    }
}
// (With a minus in it, GCC 12 makes a fused fmaddsub of this even under -ffp-contract=off.)
static void rope(float *head, const float *table, int head_dim) {
    const float *cosine = table, *sine = table + head_dim;
    for (int i = 0; i < head_dim; i += 2) {
        float a = head[i], b = head[i + 1];
        head[i] = a * cosine[i] + b * sine[i];
        head[i + 1] = b * cosine[i + 1] + a * sine[i + 1];
    }
}

// 5. The gated activation (SwiGLU, arXiv:2002.05202): gate[i] = act(gate[i]) * up[i]. The act is
// near x for x > 0 and near 0 for x < 0, so a number of gate says whether a number of up counts:
// an if, learned. Without such a bend the layer's two steps could as well be one matrix.
//     SiLU(x) = x / (1 + e^-x);  GELU(x) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3), the
// tanh form of arXiv:1606.08415.
static void gated_activation(float *gate, const float *up, int n, bool gelu) {
    float e[64];  // (In a loop of its own: GCC would else divide by e^88, too, just in case, and
                  // the subnormal quotients take some processors a hundred cycles each.)
    for (int done = 0; done < n; done += 64, gate += 64, up += 64) {
        int some = n - done < 64 ? n - done : 64;
        for (int i = 0; i < some; i++) {
            float x = gate[i], u = 0.797884561f * (x + 0.044715f * (x * x * x));
            e[i] = gelu ? -2.0f * u : -x;
        }
        exp_all(e, some, 0);
        for (int i = 0; i < some; i++) gate[i] = gate[i] / (1.0f + e[i]) * up[i];
    }
}

static void add(float *x, const float *y, int n) { for (int i = 0; i < n; i++) x[i] += y[i]; }

// ---- Attention, and the KV cache: the keys and values of all positions so far. A token looks only
// at itself and the tokens before it. So what it computed, its keys and values in every layer, will
// never change when the text grows: they are kept, and a new token costs one pass, not the whole
// text again.

// One cache holds several sequences. Sequence 0 is the trunk; sequence s > 0 is a branch, which
// reads the positions before from[s] from the trunk, and stores only its own: many continuations of
// one prompt share it. With a window, a token sees the trunk's positions before from[s], and of its
// own sequence the newest only (in the first half of the layers, which look less far back, a third
// of these); a branch then keeps little more than the window. Details has the layout.
typedef struct {
    const Model *m;
    int n_seqs, ctx;      // ctx: positions of the trunk
    int window;           // positions; 0: all
    int key_dtype;        // F32 for float32 checkpoints, HALF for bf16, Q8 for quantized ones
    int value_dtype;      // F32, HALF, and Q8V
    int *from;            // (n_seqs)
    size_t head_bytes;    // of a chunk's keys and values of one head
    size_t chunk_bytes;   // (n_layers, n_kv_heads, head_bytes)
    size_t branch_bytes;  // of one branch
    int branch_room;      // positions of one branch
    uint8_t *data;        // the trunk
    uint8_t *branches;
    size_t bytes;         // of the trunk
    struct State *state;  // activations of forward
    bool plain;  // compute with the plain functions of part 1 even where part 3 has faster ones
    bool plain_attention;  // or attention alone, so that its weights can be observed
    // When set, forward calls it with the values of each stage, (n, width), rows padded(width)
    // apart: "x" is the residual stream before and after each layer, the other names are equations.
    // "attention" is the weights of one head, n = slot * n_heads + head, and comes from any thread.
    // After the layers there are the n slots that want logits; logits are vocab_size apart.
    void (*observe)(void *observer, const char *name, int layer, const float *x, int n, int width);
    void *observer;
} Cache;

typedef struct { int token, pos, seq; bool want_logits; } Slot;  // one position to compute

// The positions that a slot sees in a layer: from `start` on, but not those of [gap, end).
typedef struct { int start, gap, end; } Sight;
static Sight sight(const Cache *kv, int layer, const Slot *slot);
static bool sees(Sight s, int t) { return t >= s.start && (t < s.gap || t >= s.end); }
// The chunk of the cache that holds a position, which is in it at *at. Keys are the rows of one
// matrix, (positions, head_dim), values the columns of another, (head_dim, positions).
static uint8_t *cache_chunk(const Cache *kv, int seq, int pos, int layer, int head, int *at);
static Matrix cache_keys(const Cache *kv, const uint8_t *chunk);
static Matrix cache_values(const Cache *kv, const uint8_t *chunk);
static void cache_put(const Cache *kv, uint8_t *chunk, int at, const float *k, const float *v);
static void average_int8(const Cache *kv, int layer, const Slot *slot, int kv_head,
                         const float *weights, float *out);

// Attention of one query head (arXiv:1706.03762). The query says what this token looks for, a key
// what a token offers, a value what it passes on. Query times key is large where the two fit; by
// softmax these scores become weights; the result is the average of the values by these weights:
//     weight[t] = softmax over t of (q . k[t]) * scale,     out = sum over t of weight[t] * v[t]
// Every head does this with a slice of its own, head_dim wide: one may look for the verb's subject
// while another looks at the word before. Query heads can share a key/value head, to keep the cache
// small. Local layers see a window of positions only. weights (pos + 1) are set, too. (Where keys
// and values are int8, `rounded`, the query as int8, and weights as integers are multiplied.)
static void attend_plain(const Cache *kv, int layer, const Slot *slot, int head, const float *q,
                         const Quantized *rounded, float *weights, float *out) {
    const Config *c = &kv->m->c;
    int kv_head = head / (c->n_heads / c->n_kv_heads), at;
    Sight seen = sight(kv, layer, slot);
    for (int t = 0; t <= slot->pos; t++) {
        weights[t] = 0;
        if (!sees(seen, t)) continue;
        const uint8_t *chunk = cache_chunk(kv, slot->seq, t, layer, kv_head, &at);
        Matrix keys = cache_keys(kv, chunk);
        weights[t] = row_times(&keys, at, q, rounded, 0) * c->attn_scale;
    }
    softmax_without(weights, seen.start, seen.gap, seen.end, slot->pos + 1);
    if (kv->value_dtype == Q8V) {
        average_int8(kv, layer, slot, kv_head, weights, out);
        return;
    }
    for (int d = 0; d < c->head_dim; d++) out[d] = 0;
    for (int t = 0; t <= slot->pos; t++) {
        if (!sees(seen, t)) continue;
        const uint8_t *chunk = cache_chunk(kv, slot->seq, t, layer, kv_head, &at);
        Matrix values = cache_values(kv, chunk);
        for (int d = 0; d < c->head_dim; d++) out[d] += weights[t] * weight(&values, d, at);
    }
}

// ---- forward computes a batch of n positions together: one token to go on, or a prompt, or the
// newest tokens of many sequences. Each weight is then fetched from memory once for all of them.

// Slots computed at once; those that a thread takes through a matrix; those that pass a weight
// together.
enum { MAX_BATCH = 256, PART = 128, TILE = 8 };

typedef struct { const Matrix *w; float *y; int stride; } Product;
typedef struct {              // a batch on its way through the layers
    const Model *m;
    Cache *kv;
    struct State *s;
    const Slot *batch;
    int n, layer;
    const Layer *l;
    const Matrix *norm;       // of the stage that runs
    const float *in;          // input of matmul, or logits
    const Product *products;  // ... what it makes of it,
    int rows;                 // ... so many rows at a time,
    int items;                // ... which makes so many pieces of work for a part of the batch
} Pass;
typedef void Stage(const Pass *f, int i);  // a step for item i: a token, a head, some rows
typedef struct { Pass f; Stage *stage; int n; } Job;  // a stage for n items
enum { MOST_WAITING = 4 };

typedef struct State {     // the activations: arrays of n rows, padded(width) numbers apart
    float *x;              // (n, dim)      the residual stream: what the layers read and add to
    float *xb;             // (n, dim)      what goes into a layer, and what comes out of it
    float *q, *k, *v;      // (n, n_heads * head_dim), (n, n_kv_heads * head_dim) twice
    float *att_out;        // (n, n_heads * head_dim)
    float *gate, *up;      // (n, hidden_dim)
    float *rope[2];        // (n, 2, head_dim) cosines and sines, for global and for local layers
    Quantized xq;          // the input of a matrix product
    float *logits;         // (slots that want them, vocab_size)
    float *scores;         // scratch of attention
    size_t logits_capacity, scores_capacity;
    Job waiting[MOST_WAITING];  // stages that are still to be run, all for equally many items
    int n_waiting;
    atomic_bool bad;       // a logit is too large, infinite or NaN
    void *owned[16];       // the memory of all but logits and scores
    int n_owned;
    int capacity;          // slots
} State;
static State *get_state(Cache *kv, int n);  // with room for n slots
static int padded(int width);               // width rounded up; the rest is zero
static float *row_of(float *x, int i, int width) { return x + (size_t)i * (size_t)padded(width); }

// Calls task(context, item) for each item, on all threads, in any order: part 3.
typedef void Task(void *context, int item);
static _Thread_local int this_thread;  // its number, from 0
static void parallel(Task *task, void *context, int n_items);
#ifdef PLAIN
static void parallel(Task *task, void *context, int n_items) {
    for (int i = 0; i < n_items; i++) task(context, i);
}
#define rows_fast rows_plain
#define rows_at_once(n, rows, dtype) ((void)(rows), 16)
#define attention_fast attention_plain
#define map_weights map_file
#else
static void rows_fast(const Matrix *w, int first, int rows, const float *x, int x_stride,
                      const Quantized *xq, int n, float *y, int stride);
static int rows_at_once(int n, int rows, int dtype);
static void attention_fast(const Pass *f);
static const uint8_t *map_weights(const char *path, size_t *size);  // map_file in large pages
#endif

// Stages that look at one token alone wait, and are then run together, a token after the other: so
// threads do not wait for each other between them. Any other stage runs at once, after these.
static void stages_task(void *context, int i) {
    const State *s = context;
    for (int j = 0; j < s->n_waiting; j++) s->waiting[j].stage(&s->waiting[j].f, i);
}
static void run_waiting(State *s) {
    if (s->n_waiting) parallel(stages_task, s, s->waiting[0].n);
    s->n_waiting = 0;
}
static void add_waiting(const Pass *f, Stage *stage, int n) {
    State *s = f->s;
    if (s->n_waiting == MOST_WAITING) run_waiting(s);
    s->waiting[s->n_waiting++] = (Job){*f, stage, n};
}
static void each_token(const Pass *f, Stage *stage) { add_waiting(f, stage, f->n); }
static void run_stage(const Pass *f, Stage *stage, int n) {
    run_waiting(f->s);
    add_waiting(f, stage, n);
    run_waiting(f->s);
}

// Shows a stage to whoever watches. The name says what was computed.
static void observe(const Pass *f, const char *name, const float *x, int width) {
    if (!f->kv->observe) return;
    run_waiting(f->s);
    f->kv->observe(f->kv->observer, name, f->layer, x, f->n, width);
}

// Matrix products of the whole batch, y (n, rows) = x (n, cols) W^T, the rows of y `stride` numbers
// apart (0: padded). The rows of all matrices that share the input are dealt out to the threads,
// for PART tokens and then for the next, so that a thread's inputs stay in its cache.
static void quantize_stage(const Pass *f, int i) {
    int cols = f->products[0].w->cols;
    quantize(&f->s->xq, i, f->in + (size_t)i * (size_t)padded(cols), cols);
}
static int items_of(const Matrix *w, int rows) { return (w->rows + rows - 1) / rows; }
static void rows_stage(const Pass *f, int item) {
    const Product *p = f->products;
    int t = item / f->items * PART, n = f->n - t < PART ? f->n - t : PART;
    item %= f->items;
    for (; item >= items_of(p->w, f->rows); p++) item -= items_of(p->w, f->rows);
    int first = item * f->rows, rows = p->w->rows - first < f->rows ? p->w->rows - first : f->rows;
    int x_stride = padded(p->w->cols), stride = p->stride ? p->stride : padded(p->w->rows);
    Quantized xq = from_token(f->s->xq, t);
    (f->kv->plain ? rows_plain : rows_fast)(p->w, first, rows,
                                            f->in + (size_t)t * (size_t)x_stride, x_stride, &xq, n,
                                            p->y + (size_t)t * (size_t)stride + first, stride);
}
static void matmul(const Pass *pass, const float *x, const Product *products, int n_products) {
    Pass f = *pass;
    int n = f.n, rows = 0, items = 0;
    bool quantized = false;
    for (int i = 0; i < n_products; i++) {
        rows += products[i].w->rows;
        quantized |= products[i].w->dtype >= Q8;
    }
    f.in = x, f.products = products, f.rows = rows_at_once(n, rows, products[0].w->dtype);
    for (int i = 0; i < n_products; i++) items += items_of(products[i].w, f.rows);
    f.s->xq.n_blocks = (products[0].w->cols + 31) / 32, f.items = items;
    if (quantized) each_token(&f, quantize_stage);
    run_stage(&f, rows_stage, items * ((n + PART - 1) / PART));
}

// A token becomes a vector: its row of the embedding matrix. The angles of its position are
// computed here too, for use in every layer.
static void embed(const Pass *f, int i) {
    const Config *c = &f->m->c;
    float *x = row_of(f->s->x, i, c->dim);
    for (int j = 0; j < c->dim; j++)
        x[j] = weight(&f->m->token_embedding, f->batch[i].token, j) * c->embed_scale;
    for (int t = 0; t < (c->sliding_window ? 2 : 1); t++)  // global and local layers
        rope_angles(row_of(f->s->rope[t], i, 2 * c->head_dim), vec(&f->m->rope_freqs[t]),
                    f->batch[i].pos, c->head_dim);
}

// xb = norm(x), before the attention and the feed-forward layer.
static void norm_stage(const Pass *f, int i) {
    int dim = f->m->c.dim;
    rmsnorm(row_of(f->s->xb, i, dim), row_of(f->s->x, i, dim), vec(f->norm), dim, f->m->c.norm_eps);
}
static void normalize(Pass *f, const Matrix *w, const char *name) {
    f->norm = w;
    each_token(f, norm_stage);
    observe(f, name, f->s->xb, f->m->c.dim);
}

// x += xb: what a layer found is added to the residual stream (Gemma 3 brings it to a standard
// length first).
static void add_stage(const Pass *f, int i) {
    int dim = f->m->c.dim;
    float *xb = row_of(f->s->xb, i, dim);
    if (f->norm->data) rmsnorm(xb, xb, vec(f->norm), dim, f->m->c.norm_eps);
    add(row_of(f->s->x, i, dim), xb, dim);
}
static void add_to_stream(Pass *f, const Matrix *post_norm, const char *name) {
    f->norm = post_norm;
    each_token(f, add_stage);
    observe(f, name, f->s->x, f->m->c.dim);
}

// Finishes queries and keys (bias, norm, position), and puts key and value into the cache.
static void rope_and_cache(const Pass *f, int i) {
    const Config *c = &f->m->c;
    const Layer *l = f->l;
    const Slot *slot = &f->batch[i];
    int hd = c->head_dim, q_dim = c->n_heads * hd, kv_dim = c->n_kv_heads * hd, at;
    float *q = row_of(f->s->q, i, q_dim), *k = row_of(f->s->k, i, kv_dim);
    float *v = row_of(f->s->v, i, kv_dim);
    const float *angles = row_of(f->s->rope[is_local(c, f->layer)], i, 2 * hd);
    if (l->bq.data) add(q, vec(&l->bq), q_dim), add(k, vec(&l->bk), kv_dim);
    if (l->bv.data) add(v, vec(&l->bv), kv_dim);
    for (int h = 0; h < c->n_heads; h++, q += hd) {
        if (l->q_norm.data) rmsnorm(q, q, vec(&l->q_norm), hd, c->norm_eps);
        rope(q, angles, hd);
    }
    for (int h = 0; h < c->n_kv_heads; h++, k += hd, v += hd) {
        if (l->k_norm.data) rmsnorm(k, k, vec(&l->k_norm), hd, c->norm_eps);
        rope(k, angles, hd);
        uint8_t *chunk = cache_chunk(f->kv, slot->seq, slot->pos, f->layer, h, &at);
        cache_put(f->kv, chunk, at, k, v);
    }
}

static void attend_stage(const Pass *f, int item) {
    const Config *c = &f->m->c;
    int i = item / c->n_heads, h = item % c->n_heads, q_dim = c->n_heads * c->head_dim;
    float *weights = resize(NULL, (size_t)f->batch[i].pos + 1, sizeof(float));
    const float *q = row_of(f->s->q, i, q_dim) + h * c->head_dim;
    Quantized rounded = new_quantized(1, c->head_dim);
    quantize(&rounded, 0, q, c->head_dim);
    attend_plain(f->kv, f->layer, &f->batch[i], h, q, &rounded, weights,
                 row_of(f->s->att_out, i, q_dim) + h * c->head_dim);
    if (f->kv->observe)
        f->kv->observe(f->kv->observer, "attention", f->layer, weights, item, f->batch[i].pos + 1);
    free(rounded.q);
    free(weights);
}
static void attention_plain(const Pass *f) { run_stage(f, attend_stage, f->n * f->m->c.n_heads); }
static void attention(const Pass *f) {
    run_waiting(f->s);
    (f->kv->plain || f->kv->plain_attention ? attention_plain : attention_fast)(f);
}

static void activation_stage(const Pass *f, int i) {
    int hidden = f->m->c.hidden_dim;
    gated_activation(row_of(f->s->gate, i, hidden), row_of(f->s->up, i, hidden), hidden,
                     f->m->c.activation);
}

// A damaged weight shows in a slot's logits, as NaN or a number over 1e18. (Smaller ones can be
// scaled and squared.)
static void limit_stage(const Pass *f, int i) {
    int bad = 0, vocab = f->m->c.vocab_size;
    const float *logits = f->in + (size_t)i * (size_t)vocab;
    for (int j = 0; j < vocab; j++) bad |= !(fabsf(logits[j]) < 1e18f);
    if (bad) f->s->bad = true;
}

// Runs up to MAX_BATCH slots through the layers. Writes the logits that are wanted behind those of
// `done` slots, and returns how many slots these were. The texts are the equations of each stage.
static int forward_batch(Pass *f, size_t done) {
    const Config *c = &f->m->c;
    State *s = f->s;
    int q_dim = c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;

    f->layer = -1;
    each_token(f, embed);
    observe(f, "x", s->x, c->dim);
    for (f->layer = 0; f->layer < c->n_layers; f->layer++) {
        const Layer *l = f->l = &f->m->layers[f->layer];
        // Attention: tokens talk. What a token asks, offers and passes on is read off its x; what
        // the heads bring back, side by side, goes through wo to the residual stream.
        normalize(f, &l->attn_norm, "xb = attn_norm(x)");
        matmul(f, s->xb, (Product[]){{&l->wq, s->q, 0}, {&l->wk, s->k, 0}, {&l->wv, s->v, 0}}, 3);
        each_token(f, rope_and_cache);
        observe(f, "q = rope(wq xb)", s->q, q_dim);
        observe(f, "k = rope(wk xb)", s->k, kv_dim);
        observe(f, "v = wv xb", s->v, kv_dim);
        attention(f);
        observe(f, "att_out = attention v", s->att_out, q_dim);
        matmul(f, s->att_out, (Product[]){{&l->wo, s->xb, 0}}, 1);
        observe(f, "xb = wo att_out", s->xb, c->dim);
        add_to_stream(f, &l->post_attn_norm, "x += xb");
        // Feed-forward: each token thinks by itself. A row of w_gate looks for something in x;
        // where it is found, a column of w_down adds what is known about it.
        normalize(f, &l->ffn_norm, "xb = ffn_norm(x)");
        matmul(f, s->xb, (Product[]){{&l->w_gate, s->gate, 0}, {&l->w_up, s->up, 0}}, 2);
        observe(f, "gate = w_gate xb", s->gate, c->hidden_dim);
        observe(f, "up = w_up xb", s->up, c->hidden_dim);
        each_token(f, activation_stage);
        observe(f, "gate = activation(gate) * up", s->gate, c->hidden_dim);
        matmul(f, s->gate, (Product[]){{&l->w_down, s->xb, 0}}, 1);
        observe(f, "xb = w_down gate", s->xb, c->dim);
        add_to_stream(f, &l->post_ffn_norm, "x");
    }
    // The classifier: every token of the vocabulary has a row, and the better it fits the x that
    // the layers have made of the last token, the higher its logit.
    int wanted = 0;
    run_waiting(s);
    for (int i = 0; i < f->n; i++)
        if (f->batch[i].want_logits)
            rmsnorm(row_of(s->xb, wanted++, c->dim), row_of(s->x, i, c->dim),
                    vec(&f->m->final_norm), c->dim, c->norm_eps);
    if (!wanted) return 0;
    f->n = wanted;
    float *logits = s->logits + done * (size_t)c->vocab_size;
    observe(f, "xb = final_norm(x)", s->xb, c->dim);
    matmul(f, s->xb, (Product[]){{&f->m->classifier, logits, c->vocab_size}}, 1);
    observe(f, "logits = classifier xb", logits, c->vocab_size);
    f->in = logits, s->bad = false;
    run_stage(f, limit_stage, wanted);
    if (s->bad)
        die("%s: the model computes a number that is infinite, NaN or over 1e18; its file may be "
            "damaged: try -m check", f->m->path);
    return wanted;
}

// The model: returns the logits of the slots that want them, (wanted, vocab_size), in the batch's
// order; they are valid until the next call. The positions before a slot's own must be in the cache
// or in the batch. A sequence's slots must be in ascending order.
static float *forward(const Model *m, Cache *kv, const Slot *batch, int n) {
    size_t wanted = 0, done = 0;
    for (int i = 0; i < n; i++) wanted += batch[i].want_logits;
    State *s = get_state(kv, n < MAX_BATCH ? n : MAX_BATCH);
    s->n_waiting = 0;  // (an error can have left some)
    if (wanted > s->logits_capacity) {
        s->logits = resize(s->logits, wanted * (size_t)m->c.vocab_size, sizeof(float));
        s->logits_capacity = wanted;
    }
    for (int i = 0; i < n; i += MAX_BATCH) {
        int some = n - i < MAX_BATCH ? n - i : MAX_BATCH;
        Pass f = {.m = m, .kv = kv, .s = s, .batch = batch + i, .n = some};
        done += (size_t)forward_batch(&f, done);
    }
    return s->logits;
}

// ---- The sampler: draws the next token. With the same seed it draws what llama2.c draws.

typedef struct { float p; int token; } Candidate;
typedef struct {
    float temperature;      // 0: always the likeliest token; 1: as the model says; more: bolder
    float top_p;            // of the likeliest tokens that together exceed this probability; 1: off
    int top_k;              // of the k likeliest; 0: off
    float min_p;            // of those at least this fraction as likely as the likeliest; 0: off
    float repeat_penalty;   // logits of tokens in the text are made worse by this factor; 1: off
    uint64_t rng;           // state of the random generator
    float coin;             // the random number of the last draw, and from how many candidates
    int kept;               // it drew; 0: from all tokens, in the order of their ids
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

static int argmax(const float *x, int n) {
    float max = largest(x, 0, n);
    for (int i = 0; i < n; i++)
        if (x[i] == max) return i;
    return 0;
}

// The limits: draws from the smallest number of the likeliest tokens that all of them allow. The
// many others are unlikely each, but together they would be drawn now and then, and spoil the text.
static int sample_candidates(Sampler *s);

// Draws a token from logits (vocab_size); text (n) is what the repetition penalty looks at.
// Temperature T divides the logits before the softmax: p[i] = e^(logit[i] / T) / sum. Two tokens
// with logits 2 and 1 are drawn with 73% and 27%; at T = 0.5, with logits 4 and 2, with 88% and
// 12%; at T = 2 with 62% and 38%. So a low temperature sharpens, a high one levels.
static int sample(Sampler *s, const float *logits, const int *text, int n) {
    memcpy(s->p, logits, (size_t)s->vocab_size * sizeof(float));
    if (s->repeat_penalty != 1)  // arXiv:1909.05858, each token once
        for (int i = 0; i < n; i++) {
            float l = logits[text[i]];
            s->p[text[i]] = l > 0 ? l / s->repeat_penalty : l * s->repeat_penalty;
        }
    int best = argmax(s->p, s->vocab_size);
    if (s->temperature == 0) return best;
    float max = s->p[best];
    for (int i = 0; i < s->vocab_size; i++) s->p[i] = (s->p[i] - max) / s->temperature;
    softmax(s->p, 0, s->vocab_size);
    float cdf = 0;
    s->coin = random_f32(&s->rng);
    s->kept = 0;
    if ((s->top_p > 0 && s->top_p < 1) || s->top_k || s->min_p > 0) return sample_candidates(s);
    for (int i = 0; i < s->vocab_size; i++) {
        cdf += s->p[i];
        if (s->coin < cdf) return i;
    }
    return s->vocab_size - 1;
}

// And so a text grows; part 4 does this with streaming, stopping and many decoders at once:
//
//     for (int pos = 0; pos < steps; pos++) {
//         float *logits = forward(model, cache, &(Slot){token, pos, 0, true}, 1);
//         token = pos + 1 < n_prompt ? prompt[pos + 1] : sample(sampler, logits, NULL, 0);
//         print(decode(token));
//     }

// ---- Details: the sampler's limits

static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

// The probabilities left do not add up to 1: the random number is scaled to their sum.
static int sample_candidates(Sampler *s) {
    Candidate *c = s->candidates;
    int n = 0, kept = 0;
    bool nucleus = s->top_p > 0 && s->top_p < 1;
    // Tokens below a cutoff cannot be drawn: they need not be sorted. For the k likeliest, it is
    // what a count of the probabilities' exponents leaves.
    float cutoff = nucleus ? (1.0f - s->top_p) / (float)(s->vocab_size - 1) : 0;
    float min = s->min_p > 0 ? s->min_p * largest(s->p, 0, s->vocab_size) : 0;
    if (s->top_k) {
        int counts[256] = {0}, exponent = 255;
        for (int i = 0; i < s->vocab_size; i++) counts[bits_of(s->p[i]) >> 23 & 255]++;
        for (int some = counts[255]; some < s->top_k && exponent; some += counts[--exponent]) {}
        float least = float_of((uint32_t)exponent << 23);
        cutoff = least > cutoff ? least : cutoff;
    }
    cutoff = min > cutoff ? min : cutoff;
    for (int i = 0; i < s->vocab_size; i++)
        if (s->p[i] >= cutoff) c[n++] = (Candidate){s->p[i], i};
    if (n == 0) return argmax(s->p, s->vocab_size);
    qsort(c, (size_t)n, sizeof *c, by_probability);
    if (s->top_k && n > s->top_k) n = s->top_k;
    float sum = 0, cdf = 0;
    while (kept < n && (!kept || c[kept].p >= s->min_p * c[0].p) && !(nucleus && sum > s->top_p))
        sum += c[kept++].p;
    s->kept = kept;
    for (int i = 0; i < kept; i++) {
        cdf += c[i].p;
        if (s->coin * sum < cdf) return c[i].token;
    }
    return c[kept - 1].token;
}

// ---- Details: numbers. Only + - * / and sqrtf, which IEEE 754 rounds the same way everywhere.

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

// e^x to about 1 ulp (Cephes expf): x = n ln2 + r, e^x = 2^n e^r, and e^r is a polynomial. First r
// and n + 1.5 * 2^23, which rounds n to an integer and shows it in the lowest bits.
static inline float exp_rest(float x, float *n_shifted) {
    float most = x > 88.0f ? 88.0f : x;  // (To change x twice takes GCC 12 twice the steps.)
    x = x < -87.0f ? -87.0f : most;
    *n_shifted = x * 1.44269504f + 12582912.0f;
    float n = *n_shifted - 12582912.0f;
    return x - n * 0.693359375f - n * -2.12194440e-4f;
}
static inline float exp_power(float r, float n_shifted) {
    float r2 = r * r;  // (a tree: a chain of products would wait for each)
    float p = ((1.9875691500e-4f * r + 1.3981999507e-3f) * r2 +
               (8.3334519073e-3f * r + 4.1665795894e-2f)) * r2 +
              (1.6666665459e-1f * r + 5.0000001201e-1f);
    return float_of(bits_of(p * r2 + r + 1.0f) + ((bits_of(n_shifted) - 0x4b400000u) << 23));
}
static inline float exp_(float x) {
    float n_shifted, r = exp_rest(x, &n_shifted);
    return exp_power(r, n_shifted);
}
// (In two loops, as a core has room for more of the shorter chains of steps that wait for each
// other: 1.2 times as fast as one loop on Zen 3.)
static void exp_all(float *x, int n, float minus) {
    enum { SOME = 128 };
    float r[SOME], n_shifted[SOME];
    for (int at = 0; at < n; at += SOME) {
        int some = n - at < SOME ? n - at : SOME;
        for (int i = 0; i < some; i++) r[i] = exp_rest(x[at + i] - minus, &n_shifted[i]);
        for (int i = 0; i < some; i++) x[at + i] = exp_power(r[i], n_shifted[i]);
    }
}

// e^x in double for |x| < 700: (e^(x/1024))^1024 with a short Taylor series.
static double exp_double(double x) {
    double y = x / 1024, term = 1, sum = 1;
    for (int i = 1; i < 14; i++) sum += term *= y / i;
    for (int i = 0; i < 10; i++) sum *= sum;
    return sum;
}

// A sum of many numbers is made of 16 partial sums, number i in sum i mod 16: a SIMD unit does them
// side by side, and the order is the same on every machine, as rounding depends on it.
static float tree_sum(float *p) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) p[i] += p[i + width];
    return p[0];
}
static inline float sum16(const float *x, const float *y, int first, int n) {
    float sums[16] = {0};
    int i = first;
    for (; i < n && i % 16; i++) sums[i % 16] += y ? x[i] * y[i] : x[i];
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += y ? x[i + j] * y[i + j] : x[i + j];
    for (; i < n; i++) sums[i % 16] += y ? x[i] * y[i] : x[i];
    return tree_sum(sums);
}
static float largest(const float *x, int first, int n) {
    enum { LANES = 32 };  // (A loop of 16 is unrolled by GCC 12 before it could become SIMD.)
    float max[LANES];
    int i = first;
    for (int j = 0; j < LANES; j++) max[j] = x[first];
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) max[j] = x[i + j] > max[j] ? x[i + j] : max[j];
    for (; i < n; i++) max[0] = x[i] > max[0] ? x[i] : max[0];
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; j++) max[j] = max[j + width] > max[j] ? max[j + width] : max[j];
    return max[0];
}

// Cosine and sine of x >= 0 in double: x = k pi/2 + r, then Taylor series and the quadrant.
static void cos_sin(double x, float *cosine, float *sine) {
    double k = x * 0.63661977236758134 + 6755399441055744.0 - 6755399441055744.0;
    double r = x - k * 1.57079632673412561417 - k * 6.07710050650619224932e-11, r2 = r * r;
    double s = 0, c = 0;
    for (int i = 15; i > 1; i -= 2) s = (s + 1) * -r2 / (i * (i - 1));
    for (int i = 16; i > 1; i -= 2) c = (c + 1) * -r2 / (i * (i - 1));
    s = r * (s + 1), c = c + 1;
    int quadrant = (int)((int64_t)k & 3);
    *cosine = (float)(quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s);
    *sine = (float)(quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c);
}

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

// ---- Details: how a matrix lies in memory. Vectors (and llama2.c's matrices) are ROWS. All other
// dtypes come in panels of 16 rows, a number of each row side by side, so that a SIMD unit sums 16
// rows at once, each in column order: F32 and HALF [cols][16], BF16 [cols / 2][16][2]. Quantized
// panels are cut into blocks of 32 columns: first the half-precision scales of the 16 rows, [16],
// for Q4A then minima, [16], then quants, 4 columns of a row side by side: Q8 int8 [8][16][4]; Q4
// and Q4A [4][16][4], low halves of the bytes columns 0 to 15, high halves columns 16 to 31.
// Q8V are int8 [cols / 4][16][4]; float scales of the columns come behind all panels.

static const char *const dtype_names[N_DTYPES] = {"f32", "f32", "bf16", "q8", "q4", "q4a", "bytes"};
static int scale_bytes(int dtype) { return dtype == Q4A ? 64 : 32; }
static int block_bytes(int dtype) { return scale_bytes(dtype) + (dtype == Q8 ? 512 : 256); }
static size_t panel_bytes(int dtype, int cols) {
    size_t n = (size_t)cols;
    if (dtype == HALF) return n * 32;
    if (dtype == Q8V) return n * 16;
    if (dtype == ROWS || dtype == F32) return n * 64;
    return dtype == BF16 ? (n + 1) / 2 * 64 : (n + 31) / 32 * (size_t)block_bytes(dtype);
}
static size_t matrix_bytes(int dtype, int rows, int cols) {
    if (dtype == BYTES) return (size_t)cols;
    if (dtype == ROWS) return (size_t)rows * (size_t)cols * 4;
    return ((size_t)rows + 15) / 16 * panel_bytes(dtype, cols) +
           (dtype == Q8V ? (size_t)cols * sizeof(float) : 0);
}
static const float *column_scales(const Matrix *w) {
    return floats(w->data + ((size_t)w->rows + 15) / 16 * panel_bytes(Q8V, w->cols));
}
static size_t column_at(int cols, int r, int c) {
    return (((size_t)(r / 16) * (size_t)cols + (size_t)c) / 4 * 16 + (size_t)(r % 16)) * 4 +
           (size_t)(c % 4);
}
static int column_quant(const Matrix *w, int r, int c) {
    return (int8_t)w->data[column_at(w->cols, r, c)];
}

// The integer of column c (0 to 31) of a block for row r (0 to 15) of its panel.
static int quant(int dtype, const uint8_t *block, int r, int c) {
    const uint8_t *q = block + scale_bytes(dtype) + r * 4 + c % 4;
    if (dtype == Q8) return (int8_t)q[c / 4 * 64];
    uint8_t pair = q[c % 16 / 4 * 64];
    return (c < 16 ? pair & 15 : pair >> 4) - (dtype == Q4 ? 8 : 0);
}
static float weight(const Matrix *w, int r, int c) {
    size_t i = (size_t)c;
    if (w->dtype == ROWS) return vec(w)[(size_t)r * (size_t)w->cols + i];
    if (w->dtype == Q8V) return column_scales(w)[c] * (float)column_quant(w, r, c);
    const uint8_t *panel = w->data + (size_t)(r / 16) * panel_bytes(w->dtype, w->cols);
    r %= 16;
    if (w->dtype == F32) return floats(panel)[i * 16 + (size_t)r];
    if (w->dtype == HALF) return half_to_float(halves(panel)[i * 16 + (size_t)r]);
    if (w->dtype == BF16)
        return float_of((uint32_t)halves(panel)[(i / 2 * 16 + (size_t)r) * 2 + i % 2] << 16);
    const uint8_t *block = panel + i / 32 * (size_t)block_bytes(w->dtype);
    float x = half_to_float(halves(block)[r]) * (float)quant(w->dtype, block, r, c % 32);
    return w->dtype == Q4A ? x + half_to_float(halves(block)[16 + r]) : x;
}

static Quantized new_quantized(int n, int cols) {
    Quantized x = {.n_blocks = (cols + 31) / 32};
    size_t blocks = (size_t)round_up(n, TILE) * (size_t)x.n_blocks;
    x.q = resize(NULL, blocks, 32 + 3 * 4);
    x.d = (float *)(void *)(x.q + blocks * 32);
    x.dsum = x.d + blocks;
    x.minus8 = (int32_t *)(void *)(x.dsum + blocks);
    return x;
}
// Activations of 8 tokens lie side by side, block by block.
static size_t block_at(const Quantized *x, int token, int block) {
    return (size_t)((token / TILE * x->n_blocks + block) * TILE + token % TILE);
}
static Quantized from_token(Quantized x, int token) {
    size_t at = block_at(&x, token, 0);
    x.q += at * 32, x.d += at, x.dsum += at, x.minus8 += at;
    return x;
}

// One row of a quantized matrix times the rounded activations of a token: in integers within a
// block, then times the weight's scale, times the activation's.
static float quantized_row(const Matrix *w, int r, const Quantized *x, int token) {
    const uint8_t *block = w->data + (size_t)(r / 16) * panel_bytes(w->dtype, w->cols);
    float sum = 0;
    r %= 16;
    for (int b = 0; b * 32 < w->cols; b++, block += block_bytes(w->dtype)) {
        size_t at = block_at(x, token, b);
        int dot = 0;
        const int8_t *q = x->q + at * 32;
        for (int c = 0; c < 32; c++) dot += quant(w->dtype, block, r, c) * q[c];
        sum += (float)dot * half_to_float(halves(block)[r]) * x->d[at];
        if (w->dtype == Q4A) sum += half_to_float(halves(block)[16 + r]) * x->dsum[at];
    }
    return sum;
}

// The integer nearest to x, |x| < 2^22; halves to even.
static inline int32_t to_integer(float x) {
    return (int32_t)(bits_of(x + 12582912.0f) - 0x4b400000u);
}
// The scale with which the largest |x| becomes `steps`. Instead of a subnormal one it is 0; of an
// infinity or NaN it is NaN, so that the logits show it (but in the KV cache it is zero).
static inline float scale_of(const float *x, int n, float steps) {
    uint32_t max = 0;
    for (int i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffff;
        max = a > max ? a : max;
    }
    float d = float_of(max) / steps;
    return max >= 0x7f800000 ? NAN : d < FLT_MIN ? 0 : d;
}
// Rounds x (n) to int8 by blocks of 32: d = max|x| / 127, q = x / d to nearest even.
static void quantize(Quantized *out, int token, const float *x, int n) {
    float last[32] = {0};
    for (int b = 0; b * 32 < n; b++, x += 32) {
        if (n - b * 32 < 32) x = memcpy(last, x, (size_t)(n - b * 32) * sizeof(float));
        size_t at = block_at(out, token, b);
        float d = scale_of(x, 32, 127), inverse = d > 0 ? 1.0f / d : 0.0f;
        int8_t *q = out->q + at * 32;
        int32_t sum = 0;
        for (int i = 0; i < 32; i++) {
            int32_t v = to_integer(d > 0 ? x[i] * inverse : 0.0f);
            q[i] = (int8_t)v;
            sum += v;
        }
        out->d[at] = d;
        out->minus8[at] = -8 * sum;
        out->dsum[at] = d * (float)sum;
    }
}

// ---- Details: errors and memory. An error is one line on stderr that says what, where and what to
// do; the exit status is 1.

static _Thread_local jmp_buf *recovery;  // where to go on after an error, where that is possible

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    if (recovery) longjmp(*recovery, 1);
    exit(1);
}

// count * size is checked against overflow.
static void *resize(void *old, size_t count, size_t size) {
    if (size && count > SIZE_MAX / 2 / size) die("out of memory: %zu x %zu bytes", count, size);
    size_t bytes = count && size ? count * size : 1;
    void *p = old ? realloc(old, bytes) : malloc(bytes);  // GCC 12's analyser knows them apart
    if (!p) die("out of memory: cannot get %zu bytes", count * size);
    return p;
}

// Zeroed memory that is not touched before it is used, so that it costs nothing until then.
static void *reserve(size_t count, size_t size, const char *what) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    size_t bytes = count > SIZE_MAX / 2 / size ? SIZE_MAX : count * size;  // nobody has SIZE_MAX
    void *p = mmap(NULL, bytes + !bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) die("out of memory: %zu MiB for %s", bytes >> 20, what);
    return p;
}

// Asks for pages of 2 MiB where the system has them.
static void large_pages(const void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise((void *)(uintptr_t)p, bytes, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

// Zeroed memory at the start of a cache line, to be freed.
static void *zeros(size_t count, size_t size) {
    void *p = NULL;
    if (count > SIZE_MAX / 2 / size || posix_memalign(&p, 64, count * size + 64))
        die("out of memory: %zu x %zu bytes", count, size);
    return memset(p, 0, count * size + 64);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// (An odd number of cache lines, so that a column does not fall into a few sets of the cache.)
static int padded(int width) { return round_up(width, 32) + 16; }

static void *own(State *s, size_t count, size_t size) {
    return s->owned[s->n_owned++] = zeros(count, size);
}
static State *get_state(Cache *kv, int n) {
    const Config *c = &kv->m->c;
    if (!kv->state) kv->state = zeros(1, sizeof *kv->state);
    State *s = kv->state;
    if (n <= s->capacity) return s;
    s->capacity = 0;
    while (s->n_owned) free(s->owned[--s->n_owned]);
    size_t rows = (size_t)round_up(n, TILE), widest = 0;
    int q_dim = c->n_heads * c->head_dim, kv_dim = c->n_kv_heads * c->head_dim;
    struct { float **array; int width; } arrays[] = {
        {&s->x, c->dim}, {&s->xb, c->dim}, {&s->q, q_dim}, {&s->k, kv_dim}, {&s->v, kv_dim},
        {&s->att_out, q_dim}, {&s->gate, c->hidden_dim}, {&s->up, c->hidden_dim},
        {&s->rope[0], 2 * c->head_dim}, {&s->rope[1], 2 * c->head_dim},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        size_t width = (size_t)padded(arrays[i].width);
        *arrays[i].array = own(s, rows * width, sizeof(float));
        widest = width > widest ? width : widest;
    }
    s->xq = new_quantized((int)rows, (int)widest);
    s->owned[s->n_owned++] = s->xq.q;
    s->capacity = (int)rows;
    return s;
}

// ---- Details: how the KV cache lies in memory. 256 positions of a head lie together in a chunk:
// first their keys, a matrix of 256 rows in panels of 16, as the model's matrices have them, then
// their values, a matrix of 256 columns. So attention is two products of such matrices: K q, and
// values times weights.

enum { CHUNK = 256 };

// A branch's storage starts at from[s] rounded down to a block of 16, and is a ring.
static uint8_t *cache_chunk(const Cache *kv, int seq, int pos, int layer, int head, int *at) {
    uint8_t *base = kv->data;
    if (seq > 0 && pos >= kv->from[seq]) {
        base = kv->branches + (size_t)(seq - 1) * kv->branch_bytes;
        pos = (pos - (kv->from[seq] & ~15)) % kv->branch_room;
    }
    *at = pos % CHUNK;
    return base + (size_t)(pos / CHUNK) * kv->chunk_bytes +
           ((size_t)layer * (size_t)kv->m->c.n_kv_heads + (size_t)head) * kv->head_bytes;
}
static Matrix cache_keys(const Cache *kv, const uint8_t *chunk) {
    return (Matrix){kv->key_dtype, CHUNK, kv->m->c.head_dim, chunk};
}
static Matrix cache_values(const Cache *kv, const uint8_t *chunk) {
    size_t keys = matrix_bytes(kv->key_dtype, CHUNK, kv->m->c.head_dim);
    return (Matrix){kv->value_dtype, kv->m->c.head_dim, CHUNK, chunk + keys};
}
static void put_number(int dtype, uint8_t *panel, int i, float x) {
    if (dtype == F32) ((float *)(void *)panel)[i] = x;
    else ((uint16_t *)(void *)panel)[i] = float_to_half(x);
}
static void cache_put(const Cache *kv, uint8_t *chunk, int at, const float *k, const float *v) {
    int hd = kv->m->c.head_dim, r = at % 16;
    uint8_t *values = chunk + matrix_bytes(kv->key_dtype, CHUNK, hd);
    uint8_t *panel = chunk + (size_t)(at / 16) * panel_bytes(kv->key_dtype, hd);
    for (int b = 0; b * 32 < hd && kv->key_dtype == Q8; b++, panel += block_bytes(Q8)) {
        int8_t q[32];
        float d, dsum;
        int32_t minus8;
        quantize(&(Quantized){q, &d, &dsum, &minus8, 1}, 0, k + b * 32,
                 hd - b * 32 < 32 ? hd - b * 32 : 32);
        put_number(HALF, panel, r, d);
        for (int i = 0; i < 32; i += 4) memcpy(panel + 32 + i * 16 + r * 4, q + i, 4);
    }
    for (int i = 0; i < hd && kv->key_dtype != Q8; i++)
        put_number(kv->key_dtype, panel, i * 16 + r, k[i]);
    for (int i = 0; i < hd && kv->value_dtype != Q8V; i++)
        put_number(kv->value_dtype, values, (i / 16 * CHUNK + at) * 16 + i % 16, v[i]);
    if (kv->value_dtype != Q8V) return;
    float d = scale_of(v, hd, 127), inverse = d > 0 ? 1.0f / d : 0.0f;
    ((float *)(void *)(values + (hd + 15) / 16 * CHUNK * 16))[at] = d > 0 ? d : 0;
    for (int i = 0; i < hd; i++)
        values[column_at(CHUNK, i, at)] = (uint8_t)to_integer(d > 0 ? v[i] * inverse : 0.0f);
}

// The weighted average of int8 values, v = s * q. Weight times s is rounded as activations are, by
// blocks of 16 positions: unit = max / 127, w = weight * s / unit. Within a block integers w q are
// summed up; out = sum over blocks of unit * sum of w q.
static void average_int8(const Cache *kv, int layer, const Slot *slot, int kv_head,
                         const float *weights, float *out) {
    int hd = kv->m->c.head_dim, at[16];
    Matrix values[16];
    for (int d = 0; d < hd; d++) out[d] = 0;
    for (int t = 0, n; t <= slot->pos; t += n) {
        float scaled[16];
        n = slot->pos + 1 - t < 16 ? slot->pos + 1 - t : 16;
        for (int i = 0; i < n; i++) {
            const uint8_t *chunk = cache_chunk(kv, slot->seq, t + i, layer, kv_head, &at[i]);
            values[i] = cache_values(kv, chunk);
            float w = weights[t + i];
            scaled[i] = w != 0 ? w * column_scales(&values[i])[at[i]] : 0;
        }
        float unit = scale_of(scaled, n, 127), inverse = unit > 0 ? 1.0f / unit : 0.0f;
        int32_t w[16];
        for (int i = 0; i < n; i++) w[i] = unit > 0 ? to_integer(scaled[i] * inverse) : 0;
        for (int d = 0; d < hd; d++) {
            int32_t sum = 0;
            for (int i = 0; i < n; i++) sum += w[i] * column_quant(&values[i], d, at[i]);
            out[d] += (float)sum * unit;
        }
    }
}

static Sight sight(const Cache *kv, int layer, const Slot *slot) {
    const Config *c = &kv->m->c;
    int window = layer < c->n_layers / 2 ? (kv->window + 2) / 3 : kv->window;
    int from = kv->from[slot->seq], newest = window ? slot->pos + 1 - window : 0;
    int start = is_local(c, layer) ? slot->pos + 1 - c->sliding_window : 0;
    if (start < 0) start = 0;
    if (start < from && from < newest) return (Sight){start, from, newest};
    if (start < newest && from < newest) start = newest;
    return (Sight){start, start, start};
}

// Makes n branches with room for `extra` positions each, in the place of those that there are: all
// positions, or a window and as many as are computed at once.
static void add_branches(Cache *kv, int n, int extra) {
    size_t chunks = ((size_t)extra + 15 + CHUNK - 1) / CHUNK;
    if (kv->branches) munmap(kv->branches, (size_t)(kv->n_seqs - 1) * kv->branch_bytes);
    kv->branch_bytes = chunks * kv->chunk_bytes;
    kv->branch_room = (int)chunks * CHUNK;
    kv->branches = reserve(chunks * (size_t)n, kv->chunk_bytes, "the KV cache of many sequences");
    if (kv->chunk_bytes < 8 << 20) large_pages(kv->branches, (size_t)n * kv->branch_bytes);
    kv->n_seqs = n + 1;
    free(kv->from);
    kv->from = zeros((size_t)kv->n_seqs, sizeof(int));
}

// Room for ctx positions in the trunk and `extra` more in each of n_branches branches.
static void new_cache(Cache *kv, const Model *m, int ctx, int n_branches, int extra) {
    const Config *c = &m->c;
    *kv = (Cache){.m = m, .n_seqs = 1, .ctx = ctx, .from = zeros(1, sizeof(int))};
    int dtype = m->token_embedding.dtype;
    kv->key_dtype = dtype <= F32 ? F32 : dtype <= BF16 ? HALF : Q8;
    kv->value_dtype = kv->key_dtype == Q8 ? Q8V : kv->key_dtype;
    size_t chunks = ((size_t)ctx + CHUNK - 1) / CHUNK;
    kv->head_bytes = matrix_bytes(kv->key_dtype, CHUNK, c->head_dim) +
                     matrix_bytes(kv->value_dtype, c->head_dim, CHUNK);
    kv->chunk_bytes = kv->head_bytes * (size_t)c->n_kv_heads * (size_t)c->n_layers;
    kv->bytes = chunks * kv->chunk_bytes;
    kv->data = reserve(chunks, kv->chunk_bytes, "the KV cache (-c N makes the context shorter)");
    if (kv->chunk_bytes < 8 << 20) large_pages(kv->data, kv->bytes);
    if (n_branches) add_branches(kv, n_branches, extra);
}

static void free_cache(Cache *kv) {
    State *s = kv->state;
    if (s) {
        while (s->n_owned) free(s->owned[--s->n_owned]);
        free(s->logits);
        free(s->scores);
        free(s);
    }
    if (kv->data) munmap(kv->data, kv->bytes);
    if (kv->branches) munmap(kv->branches, (size_t)(kv->n_seqs - 1) * kv->branch_bytes);
    free(kv->from);
    *kv = (Cache){0};
}

// ---- Details: how checkpoints lie in files

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

// Opens a file for reading. A missing, unreadable or empty one ends the program.
static int open_file(const char *path, size_t *size) {
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // so that a pipe is an error and not a wait
    struct stat st;
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    if (fstat(fd, &st)) die("cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s is not a file", path);
    if (st.st_size <= 0) die("%s is empty", path);
    if ((uint64_t)st.st_size > SIZE_MAX / 2) die("%s is too large for this machine", path);
    *size = (size_t)st.st_size;
    return fd;
}

// Maps a file for reading.
static const uint8_t *map_file(const char *path, size_t *size) {
    int fd = open_file(path, size);
    void *data = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    close(fd);
    return data;
}

// Ends the program unless every size is in a range in which nothing below can overflow.
static void check_config(const Config *c, const char *path) {
    struct { const char *name; long value, low, high; } limits[] = {
        {"dim", c->dim, 1, 1 << 20}, {"hidden_dim", c->hidden_dim, 1, 1 << 20},
        {"n_layers", c->n_layers, 1, MAX_LAYERS}, {"n_heads", c->n_heads, 1, 1 << 14},
        {"n_kv_heads", c->n_kv_heads, 1, 1 << 14}, {"vocab_size", c->vocab_size, 1, 1 << 24},
        {"seq_len", c->seq_len, 1, 1 << 24}, {"head_dim", c->head_dim, 2, 1 << 14},
        {"activation", c->activation, 0, 1}, {"sliding_window", c->sliding_window, 0, 1 << 24},
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value < limits[i].low || limits[i].value > limits[i].high)
            die("%s is not a model (export.py makes one), or damaged: %s = %ld in its header",
                path, limits[i].name, limits[i].value);
    if (c->n_heads % c->n_kv_heads || c->head_dim % 2 || c->n_heads * c->head_dim > 1 << 20)
        die("%s: damaged: its header has %d query heads, %d key/value heads of size %d",
            path, c->n_heads, c->n_kv_heads, c->head_dim);
}

// llama2.c's versions 0 (a header of 7 numbers, negative vocab_size: untied) and 1: float32 row by
// row, without any names.
static void load_llama2c(Model *m, bool v1) {
    Config *c = &m->c;
    size_t end = v1 ? 256 : 28;
    if (m->file_size < end) die("%s is truncated: it has %zu bytes", m->path, m->file_size);
    *c = (Config){.version = v1, .norm_eps = 1e-5f, .embed_scale = 1};
    memcpy((char *)c + offsetof(Config, dim), m->file + (v1 ? 8 : 0), 28);  // dim to seq_len
    bool v0 = !v1, tied = v1 ? m->file[36] != 0 : c->vocab_size > 0;
    if (c->n_heads < 1 || c->dim % c->n_heads || c->vocab_size == INT32_MIN ||
        (v1 && c->vocab_size < 1))
        die("%s is not a model (export.py makes one), or damaged: dim %d, %d heads, vocabulary %d",
            m->path, c->dim, c->n_heads, c->vocab_size);
    c->flags = tied;
    c->vocab_size = abs(c->vocab_size);
    c->head_dim = c->dim / c->n_heads;
    check_config(c, m->path);
    c->attn_scale = 1.0f / sqrtf((float)c->head_dim);
    int dim = c->dim, hidden = c->hidden_dim, kv_dim = c->n_kv_heads * c->head_dim, n = c->n_layers;
    int vocab = c->vocab_size, half = c->head_dim / 2;

    Layer *l = m->layers = zeros((size_t)n, sizeof *l);
    Matrix unused;                 // once tables of cosines and sines
    struct { bool there; Matrix *w; int n, rows, cols; } order[] = {  // n: one in each layer
        {v0, &m->token_embedding, 1, vocab, dim}, {true, &l->attn_norm, n, 1, dim},
        {v1, &l->ffn_norm, n, 1, dim}, {v1, &m->final_norm, 1, 1, dim},
        {v1, &m->token_embedding, 1, vocab, dim}, {true, &l->wq, n, dim, dim},
        {true, &l->wk, n, kv_dim, dim}, {true, &l->wv, n, kv_dim, dim}, {true, &l->wo, n, dim, dim},
        {v0, &l->ffn_norm, n, 1, dim}, {true, &l->w_gate, n, hidden, dim},
        {true, &l->w_down, n, dim, hidden}, {true, &l->w_up, n, hidden, dim},
        {v0, &m->final_norm, 1, 1, dim}, {v0, &unused, 1, c->seq_len, c->head_dim},
        {!tied, &m->classifier, 1, vocab, dim},
    };
    for (size_t i = 0; i < sizeof order / sizeof *order; i++)
        for (int j = 0; j < order[i].n && order[i].there; j++) {
            Matrix *w = (Matrix *)(void *)((char *)order[i].w + (size_t)j * sizeof(Layer));
            *w = (Matrix){ROWS, order[i].rows, order[i].cols, m->file + end};
            end += matrix_bytes(ROWS, order[i].rows, order[i].cols);
        }
    if (m->file_size != end)
        die("%s is %s: its header asks for %zu bytes, it has %zu", m->path,
            m->file_size < end ? "truncated, or not a checkpoint" : "too long", end, m->file_size);
    if (tied) m->classifier = m->token_embedding;
    m->own_freqs = resize(NULL, (size_t)half, sizeof(float));
    for (int i = 0; i < half; i++)
        m->own_freqs[i] = (float)exp_double(-9.21034037197618274 * i / half);  // 10000^(-i/half)
    m->rope_freqs[0] = m->rope_freqs[1] =
        (Matrix){ROWS, 1, half, (const uint8_t *)(const void *)m->own_freqs};
}

typedef struct {
    uint32_t dtype, rows, cols, zero;
    uint64_t offset, bytes;
} Entry;  // the directory behind the header of version 3: one entry for each tensor

// The next tensor of the directory, which must have the shape that the header implies. `kind` is
// ROWS for a vector, BYTES for bytes (of any number), F32 for a matrix of any matrix dtype.
static Matrix next_tensor(const Model *m, size_t *next, const char *name, int kind, int rows,
                          int cols) {
    Entry e = {.dtype = N_DTYPES};
    if (*next < m->c.n_tensors)
        memcpy(&e, m->file + sizeof(Config) + *next * sizeof e, sizeof e);
    bool right = kind == F32 ? e.dtype >= F32 && e.dtype <= Q4A : e.dtype == (uint32_t)kind;
    if (kind == BYTES && e.cols <= INT_MAX) cols = (int)e.cols;
    ++*next;
    if (!right || e.rows != (uint32_t)rows ||
        e.cols != (uint32_t)cols || e.bytes != matrix_bytes((int)e.dtype, rows, cols) ||
        e.offset % 64 || e.offset > m->file_size || e.bytes > m->file_size - e.offset)
        die("%s: damaged: tensor %zu of its directory is not a %s of %d x %d", m->path, *next - 1,
            name, rows, cols);
    return (Matrix){(int)e.dtype, rows, cols, m->file + e.offset};
}

// The hash of the first bytes of a version 3 file, with both hashes in its header taken as zero.
static uint64_t file_hash(const Model *m, size_t bytes) {
    Config blank;
    memcpy(&blank, m->file, sizeof blank);
    blank.content_hash = blank.header_hash = 0;
    return mix64(bytes) + hash_words(&blank, sizeof blank, 0) +
           hash_words(m->file + sizeof blank, bytes - sizeof blank, sizeof blank / 8);
}

static void load_v3_header(Model *m) {
    Config *c = &m->c;
    if (m->file_size < sizeof *c) die("%s is truncated: it has %zu bytes", m->path, m->file_size);
    memcpy(c, m->file, sizeof *c);
    if (c->file_size != m->file_size)
        die("%s is %s: its header says %llu bytes, it has %zu", m->path,
            c->file_size > m->file_size ? "truncated" : "damaged or too long",
            (unsigned long long)c->file_size, m->file_size);
    size_t directory = c->n_tensors * sizeof(Entry);
    if (c->n_tensors > 20 * MAX_LAYERS || sizeof *c + directory > m->file_size)
        die("%s: damaged: its header has %u tensors", m->path, c->n_tensors);
    if (file_hash(m, sizeof *c + directory) != c->header_hash)
        die("%s: damaged: its header does not have the hash that it states", m->path);
    check_config(c, m->path);
    if (c->flags & ~(uint32_t)ALL_FLAGS)
        die("%s needs a newer version of this program: its header has flags %x", m->path, c->flags);
    c->name[sizeof c->name - 1] = 0;
}

static void load_v3(Model *m) {
    const Config *c = &m->c;
    size_t next = 0;
    load_v3_header(m);
    int dim = c->dim, hidden = c->hidden_dim, head = c->head_dim;
    int q_dim = c->n_heads * head, kv_dim = c->n_kv_heads * head;
#define TENSOR(kind, field, rows, cols) m->field = next_tensor(m, &next, #field, kind, rows, cols)
    TENSOR(ROWS, rope_freqs[0], 1, head / 2);
    m->rope_freqs[1] = m->rope_freqs[0];
    if (c->flags & LOCAL_ROPE) TENSOR(ROWS, rope_freqs[1], 1, head / 2);
    for (int i = 0; i < head; i++) {
        float freq = vec(&m->rope_freqs[i % 2])[i / 2];
        if (!(freq >= 0 && freq <= 1))
            die("%s: damaged: an inverse frequency is not from 0 to 1", m->path);
    }
    TENSOR(F32, token_embedding, c->vocab_size, dim);
    m->layers = zeros((size_t)c->n_layers, sizeof *m->layers);
    for (int l = 0; l < c->n_layers; l++) {
        TENSOR(ROWS, layers[l].attn_norm, 1, dim);
        TENSOR(F32, layers[l].wq, q_dim, dim);
        TENSOR(F32, layers[l].wk, kv_dim, dim);
        TENSOR(F32, layers[l].wv, kv_dim, dim);
        if (c->flags & QKV_BIAS) TENSOR(ROWS, layers[l].bq, 1, q_dim);
        if (c->flags & QKV_BIAS) TENSOR(ROWS, layers[l].bk, 1, kv_dim);
        if (c->flags & QKV_BIAS) TENSOR(ROWS, layers[l].bv, 1, kv_dim);
        if (c->flags & QK_NORM) TENSOR(ROWS, layers[l].q_norm, 1, head);
        if (c->flags & QK_NORM) TENSOR(ROWS, layers[l].k_norm, 1, head);
        TENSOR(F32, layers[l].wo, dim, q_dim);
        if (c->flags & SANDWICH_NORM) TENSOR(ROWS, layers[l].post_attn_norm, 1, dim);
        TENSOR(ROWS, layers[l].ffn_norm, 1, dim);
        TENSOR(F32, layers[l].w_gate, hidden, dim);
        TENSOR(F32, layers[l].w_up, hidden, dim);
        TENSOR(F32, layers[l].w_down, dim, hidden);
        if (c->flags & SANDWICH_NORM) TENSOR(ROWS, layers[l].post_ffn_norm, 1, dim);
    }
    TENSOR(ROWS, final_norm, 1, dim);
    m->classifier = m->token_embedding;
    if (!(c->flags & TIED_EMBEDDING)) TENSOR(F32, classifier, c->vocab_size, dim);
    if (next == c->n_tensors) return;  // it has no reference values
    TENSOR(BYTES, check_ids, 1, 0);
    TENSOR(ROWS, check_norms, 1, c->n_layers + 1);
    TENSOR(ROWS, check_logits, 1, c->vocab_size);
    TENSOR(BYTES, check_cases, 1, 0);
    if (next != c->n_tensors)
        die("%s: damaged: its directory has %u tensors, not %zu", m->path, c->n_tensors, next);
#undef TENSOR
}

// Opens a checkpoint of any version, told apart by its first bytes. Errors end the program.
static void load_model(Model *m, const char *path) {
    *m = (Model){.path = path};
    m->file = map_weights(path, &m->file_size);
    uint32_t first[2] = {0, 0};
    memcpy(first, m->file, m->file_size < 8 ? m->file_size : 8);
    bool versioned = first[0] == 0x616b3432, gguf = first[0] == 0x46554747;
    if (gguf || (versioned && first[1] == 2))
        die("%s is a %s: convert it with `.venv/bin/python export.py %s model.bin`", path,
            gguf ? "GGUF file" : "version 2 file of llama2.c", path);
    if (!versioned) load_llama2c(m, false);
    else if (first[1] == 1) load_llama2c(m, true);
    else if (first[1] == 3) load_v3(m);
    else die("%s: version %u is unknown; this program reads versions 0, 1 and 3", path, first[1]);
}

static void free_model(Model *m) {
    munmap((void *)(uintptr_t)m->file, m->file_size);
    free(m->layers);
    free(m->own_freqs);
    *m = (Model){0};
}

// =================================================================================================
// Part 2. The tokenizer: text <-> tokens
// =================================================================================================
//
// Tokens are the pieces of text that a model reads and writes. Byte pair encoding starts with
// single bytes or characters and joins neighbours into longer pieces, the best pair first, until no
// pair is left. Two kinds: byte-level BPE (GPT-2, Llama 3, SmolLM2, Qwen) cuts the text into words
// first and joins pairs by rank; SentencePiece BPE (Llama 2, Gemma) joins the whole text by score.

enum { BYTE_LEVEL, SENTENCEPIECE };
enum { NORMAL, CONTROL, USER_DEFINED, BYTE, UNUSED };  // types of a token
enum { LETTER = 1, NUMBER, SPACE, N_CHARS = 0x110000 };  // classes of a character
enum { ADD_BOS = 1, ADD_SPACE_PREFIX = 2, IGNORE_MERGES = 4, PREFIX_START_ONLY = 8 };
enum { DEFAULT_SYSTEM, SYSTEM_BEFORE, SYSTEM_AFTER, USER_BEFORE, USER_AFTER, USER_BEFORE_SYSTEM,
       USER_AFTER_SYSTEM, LATER_BEFORE, LATER_AFTER, ASSISTANT_AFTER, N_CHAT };  // chat pieces

typedef struct { const char *s; size_t len; } Text;
typedef struct { uint32_t first, last, class; } Range;
typedef struct { Text text; float score; int type; } Token;
typedef struct {
    uint32_t magic, version;  // 0x336b6f74 "tok3", 1
    uint64_t hash;            // fingerprint: hash64 of all that follows
    uint32_t kind;
    int32_t vocab_size, bos, eos, unk;  // -1: none
    uint32_t flags;
    uint8_t split, digits, isolate_digits, zero;  // the rule that cuts words: see next_word
    uint32_t n_merges, n_ranges, n_stops, n_chat;
    float temperature, top_p;  // the model's own defaults; -1: none
    uint8_t zero2[12];
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 80, "the tokenizer's header has 80 bytes");

// A hash table from texts to numbers (open addressing); an empty entry has no text, and number -1.
typedef struct { const char *s; uint32_t len; int number; } Named;
typedef struct { Named *entries; size_t mask; } Index;

typedef struct {
    TokenizerHeader h;
    bool llama2c;             // read from llama2.c's layout
    char *path;
    const uint8_t *file;
    size_t file_size;
    Token *tokens;            // (vocab_size)
    Index by_text;            // tokens
    Index merges;             // ranks of pairs of tokens, two uint32
    uint8_t *classes;         // (N_CHARS)
    size_t special[256];      // longest control or user-defined token that starts with this byte
    int byte_token[256];      // token of a single byte, -1 none
    const int32_t *stops;     // (n_stops) tokens that end an answer
    Text chat[N_CHAT];
} Tokenizer;

typedef struct { int *ids; size_t n, capacity; } Ids;
static void push(Ids *ids, int id) {
    if (ids->n == ids->capacity) {
        ids->capacity = ids->capacity ? ids->capacity * 2 : 64;
        ids->ids = resize(ids->ids, ids->capacity, sizeof(int));
    }
    ids->ids[ids->n++] = id;
}

// ---- Looking things up

static uint32_t read_u32(const uint8_t *p) { uint32_t u; memcpy(&u, p, 4); return u; }

static const uint64_t HASH_START = 0xcbf29ce484222325u;  // FNV-1a
static uint64_t hash_byte(uint64_t h, char c) { return (h ^ (uint8_t)c) * 0x100000001b3u; }
static uint64_t text_hash(Text t) {
    uint64_t h = HASH_START;
    // NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage): it takes an int's 2nd byte for unset
    for (size_t i = 0; i < t.len; i++) h = hash_byte(h, t.s[i]);
    return h;
}
static Index new_index(size_t n) {
    Index index = {.mask = 1};
    while (index.mask < 2 * n) index.mask *= 2;
    index.entries = zeros(index.mask--, sizeof(Named));
    for (size_t i = 0; i <= index.mask; i++) index.entries[i].number = -1;
    return index;
}
// The entry of a text with this hash, or the empty one that it would have.
static Named *entry_of(const Index *index, Text text, uint64_t h) {
    for (size_t i = (size_t)(h ^ h >> 32);; i++) {
        Named *e = &index->entries[i & index->mask];
        if (!e->len || (e->len == text.len && !memcmp(e->s, text.s, text.len))) return e;
    }
}
static void add_entry(const Index *index, Text text, int number) {
    Named *e = entry_of(index, text, text_hash(text));
    if (!e->len) *e = (Named){text.s, (uint32_t)text.len, number};  // the first of equal texts
}
// The token with this text, or -1. Byte and unused tokens are not found by their text.
static int find_token(const Tokenizer *t, Text text) {
    return entry_of(&t->by_text, text, text_hash(text))->number;
}
// The rank of joining tokens a and b, or -1.
static int find_merge(const Tokenizer *t, int a, int b) {
    int pair[] = {a, b};
    Text text = {(const char *)pair, sizeof pair};
    return entry_of(&t->merges, text, text_hash(text))->number;
}

// Decodes one character of UTF-8; a byte that is not part of a valid one counts as U+FFFD.
static uint32_t next_char(const char *s, size_t len, size_t *used) {
    const uint8_t *p = (const uint8_t *)s;
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    size_t more = (size_t)((p[0] >= 0xc2) + (p[0] >= 0xe0) + (p[0] >= 0xf0));  // bytes that follow
    *used = 1;
    if (p[0] < 0x80) return p[0];
    if (!more || more >= len || p[0] > 0xf4) return 0xfffd;
    uint32_t c = p[0] & (0x3fu >> more);
    for (size_t i = 1; i <= more; i++) {
        if ((p[i] & 0xc0) != 0x80) return 0xfffd;
        c = c << 6 | (p[i] & 0x3f);
    }
    if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0xfffd;
    *used = more + 1;
    return c;
}

static uint8_t class_of(const Tokenizer *t, const char *s, size_t len, size_t *used) {
    return t->classes[next_char(s, len, used)];
}

// ---- Opening a tokenizer

// Builds the tables that both layouts need.
static void index_tokens(Tokenizer *t) {
    t->by_text = new_index((size_t)t->h.vocab_size);
    memset(t->byte_token, -1, sizeof t->byte_token);
    for (int id = 0; id < t->h.vocab_size; id++) {
        const Token *k = &t->tokens[id];
        if (!k->text.len || k->type == UNUSED) continue;
        uint8_t first = (uint8_t)k->text.s[0];
        if (k->type != BYTE) add_entry(&t->by_text, k->text, id);
        if (k->type == CONTROL || k->type == USER_DEFINED) {
            if (k->text.len > t->special[first]) t->special[first] = k->text.len;
        } else if (k->text.len == 1 && t->byte_token[first] < 0 &&
                   (k->type == BYTE) == (t->h.kind == SENTENCEPIECE)) t->byte_token[first] = id;
    }
}

// The byte that a piece of the form <0xHH> stands for, or -1.
static int byte_piece(Text text) {
    char piece[16];
    for (unsigned byte = 0; byte < 256 && text.len == 6 && text.s[0] == '<'; byte++) {
        snprintf(piece, sizeof piece, "<0x%02X>", byte);
        if (!memcmp(piece, text.s, 6)) return (int)byte;
    }
    return -1;
}

// llama2.c's layout: the longest token's length, then for each token score, length and text. It
// holds neither its own size nor any types: the model says how many tokens there are.
static const char *load_llama2c_tokenizer(Tokenizer *t, int vocab_size) {
    size_t at = 4;
    t->h = (TokenizerHeader){.kind = SENTENCEPIECE, .vocab_size = vocab_size, .bos = 1, .eos = 2,
                             .unk = 0, .flags = ADD_BOS | ADD_SPACE_PREFIX,
                             .temperature = -1, .top_p = -1};
    if (vocab_size < 3) return "is one of llama2.c, but the model has fewer than 3 tokens";
    // NOLINTNEXTLINE(clang-analyzer-unix.Malloc): free_tokenizer frees what is in t
    for (int id = 0; id < vocab_size; id++) {
        Token *k = &t->tokens[id];
        if (t->file_size - at < 8) return "has fewer tokens than the model, or is truncated";
        memcpy(&k->score, t->file + at, 4);
        k->text.len = read_u32(t->file + at + 4);
        at += 8;
        if (k->text.len > t->file_size - at) return "is not a tokenizer, or damaged";
        k->text.s = (const char *)t->file + at;
        at += k->text.len;
        int byte = byte_piece(k->text);
        static char bytes[256];
        if (id < 3) k->type = CONTROL;
        else if (byte >= 0) {
            bytes[byte] = (char)byte;
            *k = (Token){{&bytes[byte], 1}, k->score, BYTE};
        }
    }
    return at == t->file_size ? NULL : "has more tokens than the model: it is another model's";
}

// This program's own layout: header, tokens, merges, character ranges, stop tokens, chat pieces.
static const char *load_own_tokenizer(Tokenizer *t, int vocab_size) {
    TokenizerHeader *h = &t->h;
    const uint8_t *p = t->file, *end = p + t->file_size;
    if (t->file_size < sizeof *h) return "is truncated";
    memcpy(h, p, sizeof *h);
    p += sizeof *h;
    if (h->version != 1) return "has an unknown version";
    if (hash64(t->file + 16, t->file_size - 16) != h->hash) return "is damaged: its hash is wrong";
    if (h->kind > SENTENCEPIECE || h->vocab_size < 1 || h->bos < -1 || h->bos >= h->vocab_size ||
        h->eos < -1 || h->eos >= h->vocab_size || h->unk < -1 || h->unk >= h->vocab_size ||
        h->split > 2 || (h->n_chat && h->n_chat != N_CHAT)) return "is damaged: see its header";
    if (h->vocab_size > vocab_size) return "has more tokens than the model: it is another model's";
    for (int id = 0; id < h->vocab_size; id++) {
        Token *k = &t->tokens[id];
        if (end - p < 8) return "is truncated";
        memcpy(&k->score, p, 4);
        k->type = p[4];
        k->text = (Text){(const char *)p + 8, (size_t)p[6] | (size_t)p[7] << 8};
        p += 8;
        if (k->type > UNUSED || (size_t)(end - p) < k->text.len) return "is damaged";
        p += k->text.len;
    }
    p += -(p - t->file) & 3;
    if (p > end || h->n_merges * 8ull + h->n_ranges * 12ull + h->n_stops * 4ull > (size_t)(end - p))
        return "is truncated";
    const uint32_t *merges = (const void *)p;  // (n_merges, 2) tokens, best first
    const Range *range = (const void *)(merges + (size_t)h->n_merges * 2);
    t->stops = (const void *)(range + h->n_ranges);
    p = (const uint8_t *)(t->stops + h->n_stops);
    for (uint32_t i = 0; i < h->n_chat; i++) {
        if (end - p < 4 || read_u32(p) > (size_t)(end - p) - 4) return "is truncated";
        t->chat[i] = (Text){(const char *)p + 4, read_u32(p)};
        p += 4 + t->chat[i].len;
    }
    if (p != end) return "is damaged: its end is not where it should be";
    t->classes = zeros(N_CHARS, 1);
    for (uint32_t i = 0, next = 0; i < h->n_ranges; i++, next = range++->last + 1) {
        if (range->first < next || range->last < range->first || range->last >= N_CHARS)
            return "is damaged: its character classes";
        memset(t->classes + range->first, (int)range->class, range->last + 1 - range->first);
    }
    t->merges = new_index(h->n_merges);
    for (uint32_t rank = 0; rank < h->n_merges; rank++, merges += 2) {
        if (merges[0] >= (uint32_t)h->vocab_size || merges[1] >= (uint32_t)h->vocab_size)
            return "is damaged";
        add_entry(&t->merges, (Text){(const char *)merges, 8}, (int)rank);
    }
    return NULL;
}

static void free_tokenizer(Tokenizer *t) {
    if (t->file) munmap((void *)(uintptr_t)t->file, t->file_size);
    free(t->tokens);
    free(t->by_text.entries);
    free(t->merges.entries);
    free(t->classes);
    free(t->path);
    *t = (Tokenizer){0};
}

// Opens a tokenizer for a model. Returns NULL, or what is wrong with it; the model's fingerprint,
// when it has one, must be the tokenizer's.
static const char *load_tokenizer(Tokenizer *t, const char *path, const Model *m) {
    size_t size = strlen(path) + 1;
    *t = (Tokenizer){.path = memcpy(resize(NULL, size, 1), path, size)};
    t->file = map_file(path, &t->file_size);
    t->tokens = zeros((size_t)m->c.vocab_size, sizeof *t->tokens);
    if (t->file_size < 8) return "is truncated";
    t->llama2c = read_u32(t->file) != 0x336b6f74;
    const char *wrong = t->llama2c ? load_llama2c_tokenizer(t, m->c.vocab_size)
                                   : load_own_tokenizer(t, m->c.vocab_size);
    if (!wrong && m->c.tokenizer_hash && t->h.hash != m->c.tokenizer_hash)
        wrong = "is the tokenizer of another model";
    if (!wrong) index_tokens(t);
    return wrong;
}

// Finds the model's tokenizer: the named one, or model.tok or tokenizer.bin beside the model, or
// tokenizer.bin in the current folder; the first that fits.
static void find_tokenizer(Tokenizer *t, const char *named, const Model *m) {
    const char *wrong = named ? load_tokenizer(t, named, m) : NULL;
    if (wrong) die("%s %s", named, wrong);
    if (named) return;
    const char *slash = strrchr(m->path, '/'), *dot = strrchr(m->path, '.');
    int folder = slash ? (int)(slash - m->path) + 1 : 0;
    int stem = dot && dot > m->path + folder ? (int)(dot - m->path) : (int)strlen(m->path);
    size_t size = strlen(m->path) + 100;
    char *path = resize(NULL, size, 1), *seen = resize(NULL, 3 * size, 1);
    *seen = 0;
    for (int i = 0, parts[] = {stem, folder, 0}; i < (folder ? 3 : 2); i++) {
        snprintf(path, size, "%.*s%s", parts[i], m->path, i ? "tokenizer.bin" : ".tok");
        struct stat st;
        if (stat(path, &st)) continue;
        bool usable = S_ISREG(st.st_mode) && st.st_size > 0 && !access(path, R_OK);
        wrong = usable ? load_tokenizer(t, path, m) : "cannot be read or is empty";
        if (!wrong) {
            free(seen);
            free(path);
            return;
        }
        sprintf(seen + strlen(seen), "%s%s %s", *seen ? "; " : "", path, wrong);
        free_tokenizer(t);
    }
    die("no tokenizer for %s: %s; name one with -z", m->path,
        *seen ? seen : "there is no .tok file or tokenizer.bin beside it or in this folder");
}

// ---- Encoding

// Joining neighbours works on symbols that cover the text, each kept at the place of its first
// byte, and a heap of the pairs that can be joined, the best on top: the highest priority, then the
// leftmost.
typedef struct { int id, len, prev; } Symbol;  // prev: where the one before it is, -1: none
typedef struct { float priority; int left, id, len; } Pair;
typedef struct {
    const Tokenizer *t;
    Text text;
    Symbol *symbols;
    Pair *heap;
    size_t n_heap;
    size_t capacity;  // symbols; the heap has room for three times as many
} Merger;

static bool better(const Pair *a, const Pair *b) {
    return a->priority != b->priority ? a->priority > b->priority : a->left < b->left;
}
static void push_pair(Merger *m, int left) {
    const Tokenizer *t = m->t;
    const Symbol *a = &m->symbols[left], *b = a + a->len;
    if (left + a->len >= (int)m->text.len) return;
    bool ranked = t->h.kind == BYTE_LEVEL;
    int rank = ranked ? find_merge(t, a->id, b->id) : 0, len = a->len + b->len;
    int id = rank < 0 ? -1 : find_token(t, (Text){m->text.s + left, (size_t)len});
    if (id < 0 || (!ranked && t->tokens[id].type != NORMAL)) return;
    Pair p = {ranked ? (float)-rank : t->tokens[id].score, left, id, len};
    size_t i = m->n_heap++;
    for (; i && better(&p, &m->heap[(i - 1) / 2]); i = (i - 1) / 2)
        m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = p;
}
static Pair pop_pair(Merger *m) {
    Pair top = m->heap[0], last = m->heap[--m->n_heap];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < m->n_heap) {
        if (child + 1 < m->n_heap && better(&m->heap[child + 1], &m->heap[child])) child++;
        if (!better(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
        i = child;
    }
    m->heap[i] = last;
    return top;
}

// Appends the tokens of one word (or, with SentencePiece, of a whole text).
static void encode_word(Merger *m, Text word, Ids *out) {
    const Tokenizer *t = m->t;
    if (word.len > INT_MAX / 2) die("the text is too long: %zu bytes", word.len);
    int whole = t->h.flags & IGNORE_MERGES ? find_token(t, word) : -1;
    if (whole >= 0 && t->tokens[whole].type == NORMAL) {
        push(out, whole);
        return;
    }
    if (word.len > m->capacity) {
        m->capacity = word.len * 2;
        m->symbols = resize(m->symbols, m->capacity, sizeof *m->symbols);
        m->heap = resize(m->heap, 3 * m->capacity, sizeof *m->heap);
    }
    m->text = word;
    m->n_heap = 0;
    int end = (int)word.len, prev = -1;
    for (int i = 0; i < end; prev = i, i += m->symbols[i].len) {
        size_t used = 1;
        if (t->h.kind == SENTENCEPIECE) next_char(word.s + i, (size_t)(end - i), &used);
        int id = t->h.kind == BYTE_LEVEL ? t->byte_token[(uint8_t)word.s[i]]
                                         : find_token(t, (Text){word.s + i, used});
        if (id >= 0 && t->tokens[id].type != NORMAL) id = -1;
        m->symbols[i] = (Symbol){id, (int)used, prev};
    }
    for (int i = 0; i < end; i += m->symbols[i].len) push_pair(m, i);
    while (m->n_heap) {
        Pair p = pop_pair(m);
        Symbol *a = &m->symbols[p.left], *b = a + a->len;
        if (!a->len || p.left + a->len >= end || a->len + b->len != p.len)
            continue;  // one of the two has been joined
        b->len = 0;
        a->len = p.len;
        a->id = p.id;
        if (p.left + p.len < end) a[p.len].prev = p.left;
        if (a->prev >= 0) push_pair(m, a->prev);
        push_pair(m, p.left);
    }
    for (int i = 0; i < end; i += m->symbols[i].len) {
        if (m->symbols[i].id >= 0) push(out, m->symbols[i].id);
        else for (int j = 0; j < m->symbols[i].len; j++) {  // its bytes, or unknown
            int byte = t->byte_token[(uint8_t)word.s[i + j]];
            if (byte >= 0) push(out, byte);
            else if (t->h.unk >= 0 && !j) push(out, t->h.unk);
        }
    }
}

// Length of an English contraction ('s 't 're 've 'm 'll 'd) at s, or 0.
static size_t contraction(const char *s, size_t len, bool any_case) {
    static const char *const ends[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    for (size_t i = 0; i < 7 && len && s[0] == '\''; i++) {
        size_t n = strlen(ends[i]);
        if (n < len && !(any_case ? strncasecmp : strncmp)(s + 1, ends[i], n)) return n + 1;
    }
    return 0;
}

// Length of the run of characters of one class (0: none of letter, number, space) at s, at most
// `most`.
static size_t run_of(const Tokenizer *t, const char *s, size_t len, uint32_t class, size_t most) {
    size_t n = 0, used;
    while (most-- && n < len && class_of(t, s + n, len - n, &used) == class) n += used;
    return n;
}

// Length of the first word of a text, as the regular expressions of GPT-2 (split 1) and of cl100k
// (split 2: Llama 3, Qwen) cut it:
//   1: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   2: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}
//      | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
static size_t next_word(const Tokenizer *t, const char *s, size_t len) {
    bool gpt2 = t->h.split == 1;
    size_t n = contraction(s, len, !gpt2), used, first = 0, unlimited = SIZE_MAX;
    if (n) return n;
    uint32_t class = class_of(t, s, len, &used);
    if (gpt2 ? s[0] == ' ' : class != LETTER && class != NUMBER && s[0] != '\r' && s[0] != '\n')
        first = used;
    if ((n = run_of(t, s + first, len - first, LETTER, unlimited))) return first + n;
    size_t space = s[0] == ' ', skip = gpt2 ? space : 0;
    if ((n = run_of(t, s + skip, len - skip, NUMBER, t->h.digits ? t->h.digits : unlimited)))
        return skip + n;
    if ((n = run_of(t, s + space, len - space, 0, unlimited))) {
        n += space;
        while (!gpt2 && n < len && (s[n] == '\r' || s[n] == '\n')) n++;
        return n;
    }
    n = run_of(t, s, len, SPACE, unlimited);
    if (!n) return used;
    for (size_t i = n; i && !gpt2; i--) if (s[i - 1] == '\r' || s[i - 1] == '\n') return i;
    if (n == len) return n;
    size_t last = n - 1;  // all but the last space, which belongs to the next word
    while (last && ((uint8_t)s[last] & 0xc0) == 0x80) last--;
    return last ? last : n;
}

// Appends the tokens of a text without special tokens.
static void encode_plain(Merger *m, Text text, Ids *out) {
    const Tokenizer *t = m->t;
    bool words = t->h.kind == BYTE_LEVEL && t->h.split;
    while (text.len) {
        size_t piece = text.len, used = 0;
        if (words && t->h.isolate_digits) {  // a digit is a word; the rest is cut by itself
            for (piece = 0; piece < text.len; piece += used)
                if (class_of(t, text.s + piece, text.len - piece, &used) == NUMBER) break;
            if (!piece) piece = used;
        }
        for (size_t i = 0, n; i < piece; i += n) {
            n = words ? next_word(t, text.s + i, piece - i) : piece;
            encode_word(m, (Text){text.s + i, n}, out);
        }
        text.s += piece;
        text.len -= piece;
    }
}

// The control or user-defined token at the start of a text, the longest one, or -1. Control tokens
// count only where `typed` (one flag for each byte, NULL: none) is zero throughout.
static int special_at(const Tokenizer *t, const char *s, size_t len, const char *typed) {
    size_t longest = t->special[(uint8_t)s[0]];
    uint64_t h = HASH_START;
    int found = -1;
    for (size_t n = 1; n <= longest && n <= len; n++) {
        h = hash_byte(h, s[n - 1]);
        int id = entry_of(&t->by_text, (Text){s, n}, h)->number;
        if (id < 0) continue;
        if (t->tokens[id].type == USER_DEFINED) found = id;
        if (t->tokens[id].type == CONTROL && !(typed && memchr(typed, 1, n))) found = id;
    }
    return found;
}

// Appends the tokens of a text. One that starts a text (else it continues one) gets BOS and a space
// in front if the tokenizer adds them. Special tokens in the text are recognised, except over bytes
// that are marked as typed by a user.
static void encode(const Tokenizer *t, Text text, const char *typed, bool text_start, Ids *out) {
    Merger m = {.t = t};
    size_t start = 0, first = out->n;
    char *prefixed = NULL;
    for (size_t i = 0; i <= text.len; i++) {
        bool may = i < text.len && t->special[(uint8_t)text.s[i]];
        int special = may ? special_at(t, text.s + i, text.len - i, typed ? typed + i : NULL) : -1;
        if (i < text.len && special < 0) continue;
        Text part = {text.s + start, i - start};
        bool prefix = start ? !(t->h.flags & PREFIX_START_ONLY) : text_start;
        if (part.len && prefix && t->h.flags & ADD_SPACE_PREFIX) {
            prefixed = resize(prefixed, part.len + 1, 1);
            prefixed[0] = ' ';
            memcpy(prefixed + 1, part.s, part.len);
            part = (Text){prefixed, part.len + 1};
        }
        encode_plain(&m, part, out);
        if (special >= 0) {
            push(out, special);
            start = i + t->tokens[special].text.len;
            i = start - 1;
        }
    }
    free(m.symbols);
    free(m.heap);
    free(prefixed);
    if (text_start && t->h.flags & ADD_BOS && t->h.bos >= 0 &&
        (out->n == first || out->ids[first] != t->h.bos)) {
        push(out, 0);
        memmove(out->ids + first + 1, out->ids + first, (out->n - first - 1) * sizeof(int));
        out->ids[first] = t->h.bos;
    }
}

// The text of a token that follows another (-1: nothing). Control tokens have none; SentencePiece's
// space in front of the first word is dropped.
static Text decode(const Tokenizer *t, int previous, int id) {
    if (id < 0 || id >= t->h.vocab_size || t->tokens[id].type == UNUSED) return (Text){"", 0};
    Text text = t->tokens[id].text;
    if (t->tokens[id].type == CONTROL && !t->llama2c) return (Text){"", 0};
    if (previous == t->h.bos && t->h.flags & ADD_SPACE_PREFIX && text.len && text.s[0] == ' ')
        text.s++, text.len--;
    return text;
}

// A text of so many bytes has at least this many tokens (an unknown character, too, is one).
static size_t least_tokens(const Tokenizer *t, size_t bytes) {
    size_t longest = 4;
    for (int id = 0; id < t->h.vocab_size; id++)
        if (t->tokens[id].text.len > longest) longest = t->tokens[id].text.len;
    return bytes / longest;
}

static bool is_stop(const Tokenizer *t, int id) {
    if (t->llama2c) return id == t->h.bos;  // as llama2.c does: BOS separates its stories
    for (uint32_t i = 0; i < t->h.n_stops; i++)
        if (t->stops[i] == id) return true;
    return id == t->h.eos;
}

// =================================================================================================
// Part 3. Speed: the same mathematics for SIMD units and threads
// =================================================================================================
//
// Nothing here changes a bit of a result, so a reader may skip it; with -DPLAIN it is left out.
#ifndef PLAIN

// ---- Threads. A job is a number of items, dealt out in equal ranges, one for each thread. A
// thread takes from its own range, half of what is left at a time, and then helps with the others:
// a thread that is not running holds nobody up. A range is one number, the job's above the count of
// items left, so that one compare-and-swap takes items of this job and of no other.

// What several threads write is in cache lines of its own, which may be fetched in pairs.

enum { MAX_THREADS = 256, LINES = 128 };
typedef struct { _Alignas(LINES) _Atomic uint64_t left; } Share;
static struct {
    Share shares[MAX_THREADS];
    _Alignas(LINES) _Atomic int done;
    _Alignas(LINES) _Atomic uint32_t job;
    _Atomic int n_items, n_threads, sleepers;
    _Atomic(Task *) task;
    _Atomic(void *) context;
    double alone_until, penalty;  // until when the first thread works alone; for how long
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} pool = {.n_threads = 1, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};
#define RELAXED(load_or_store, ...)                                                                \
    atomic_##load_or_store##_explicit(__VA_ARGS__, memory_order_relaxed)

static inline void pause_cpu(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// The first item of a thread's range among n.
static int range_start(int n, int thread) {
    return (int)((long long)n * thread / pool.n_threads);
}

// Takes items and does them until none is left.
static void work(void) {
    int did = 0;
    for (int i = 0; i < pool.n_threads; i++) {
        int range = (this_thread + i) % pool.n_threads;
        _Atomic uint64_t *share = &pool.shares[range].left;
        uint64_t was = atomic_load(share);
        while ((uint32_t)was) {
            int left = (int)(uint32_t)was, take = left - left / 2;
            if (!atomic_compare_exchange_weak(share, &was, was - (uint64_t)take)) continue;
            Task *task = RELAXED(load, &pool.task);
            void *context = RELAXED(load, &pool.context);
            int first = range_start(RELAXED(load, &pool.n_items), range + 1) - left;
            for (int item = first; item < first + take; item++) task(context, item);
            did += take;
            was = atomic_load(share);
        }
    }
    if (did) atomic_fetch_add(&pool.done, did);
}

// A moment of waiting, the spins-th. False after 50 microseconds: time to sleep.
static bool spin(int spins, double *since) {
    pause_cpu();
    if (spins == 0) *since = seconds();
    return spins % 16 || seconds() - *since < 50e-6;
}

static void *worker(void *argument) {
    int spins = 0;
    double since = 0;
    this_thread = (int)(intptr_t)argument;
    for (uint32_t seen = 0;;) {
        uint32_t job = atomic_load(&pool.job);
        if (job != seen) {
            seen = job;
            work();
            spins = 0;
        } else if (!spin(spins++, &since)) {
            pthread_mutex_lock(&pool.mutex);
            atomic_fetch_add(&pool.sleepers, 1);
            while (atomic_load(&pool.job) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.mutex);
            spins = 0;
        }
    }
    return NULL;
}

// When a thread that has items is not running, as another program has its core, the first one must
// wait. It then works alone for a few milliseconds, and longer if that happens again soon after.
static void parallel(Task *task, void *context, int n_items) {
    double began = n_items > 1 && pool.n_threads > 1 ? seconds() : 0;
    if (began <= pool.alone_until) {
        for (int i = 0; i < n_items; i++) task(context, i);
        double end = began > 0 ? seconds() : 0;  // the last such job may end much later
        if (end > pool.alone_until) pool.alone_until = end;
        return;
    }
    uint32_t job = RELAXED(load, &pool.job) + 1;
    RELAXED(store, &pool.task, task);
    RELAXED(store, &pool.context, context);
    RELAXED(store, &pool.n_items, n_items);
    RELAXED(store, &pool.done, 0);
    for (int i = 0, start = 0, end; i < pool.n_threads; i++, start = end) {
        end = range_start(n_items, i + 1);
        uint64_t share = (uint64_t)job << 32 | (uint32_t)(end - start);
        atomic_store_explicit(&pool.shares[i].left, share, memory_order_release);
    }
    atomic_store(&pool.job, job);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    work();
    double waiting = 0, since = 0;
    for (int spins = 0; atomic_load(&pool.done) != n_items; spins++) {
        if (waiting > 0) usleep(20);
        else if (!spin(spins, &since)) waiting = seconds();
    }
    double end = waiting > 0 ? seconds() : began;
    if (waiting > 0 && end - waiting > 5e-4 && end - waiting > 0.5 * (end - began)) {
        bool again = began < pool.alone_until + 2 * pool.penalty;
        pool.penalty = !again ? 4e-3 : pool.penalty < 0.1 ? pool.penalty * 2 : 0.1;
        pool.alone_until = end + pool.penalty;
    }
}

// Where there is a thread for every core, each stays on its own: a scheduler may else wake one on a
// core that another one is using.
static void pin(pthread_t thread, int number) {
#ifdef __linux__
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) != pool.n_threads)
        return;
    int cpu = 0;
    for (; cpu < CPU_SETSIZE && (!CPU_ISSET(cpu, &allowed) || number-- > 0); cpu++) {}
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(thread, sizeof one, &one);
#else
    (void)thread, (void)number;
#endif
}

// Starts n - 1 threads beside the calling one. Where one cannot be had, the others do its work.
static void start_threads(int n) {
    static pthread_t threads[MAX_THREADS];
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &old);  // other signals are the main thread's business
    threads[0] = pthread_self();
    for (; pool.n_threads < n; pool.n_threads++) {
        int i = pool.n_threads;
        if (pthread_create(&threads[i], NULL, worker, (void *)(intptr_t)i)) break;
        pthread_detach(threads[i]);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    for (int i = pool.n_threads - 1; i >= 0 && n > 1; i--) pin(threads[i], i);
}

// ---- Large pages. A model in the page cache is mapped in pages of 4 KiB, and looking these up can
// cost half of the memory's speed. So where there is plenty of memory the file is read into pages
// of 2 MiB.

#ifndef MADV_HUGEPAGE
static const uint8_t *map_weights(const char *path, size_t *size) { return map_file(path, size); }
#else
// Bytes of memory that this process may use: what is free, and within its control group's limit.
static uint64_t free_memory(void) {
    uint64_t least = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    char line[512], path[600];
    FILE *groups = fopen("/proc/self/cgroup", "r");
    while (groups && fgets(line, sizeof line, groups)) {
        char *name = strchr(line, ':'), *group = name ? strchr(name + 1, ':') : NULL;
        if (!group || (strncmp(name, "::", 2) && strncmp(name, ":memory:", 8))) continue;
        bool v2 = name[1] == ':';
        group[strcspn(group, "\n")] = 0;
        for (int inside = 0; inside < 2; inside++) {  // in a container the group may be the root
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/%s", v2 ? "" : "/memory",
                     inside ? "" : group + 1, v2 ? "memory.max" : "memory.limit_in_bytes");
            FILE *limit = fopen(path, "r");
            unsigned long long bytes = 0;  // or "max", which is read as 0
            if (limit && fgets(path, sizeof path, limit)) bytes = strtoull(path, NULL, 10);
            if (bytes && bytes < least) least = bytes;
            if (limit) fclose(limit);
        }
    }
    if (groups) fclose(groups);
    return least;
}

enum { LARGE_PAGE = 1 << 21 };
typedef struct {
    int fd;
    uint8_t *data;
    size_t size;
    atomic_int wrong;  // errno, or -1: it has become shorter
} Reading;
static void read_task(void *context, int item) {
    Reading *r = context;
    size_t at = (size_t)item * LARGE_PAGE,
           end = r->size - at > LARGE_PAGE ? at + LARGE_PAGE : r->size;
    while (at < end) {
        ssize_t got = pread(r->fd, r->data + at, end - at, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            r->wrong = got ? errno : -1;
            return;
        }
        at += (size_t)got;
    }
}
static const uint8_t *map_weights(const char *path, size_t *size) {
    Reading r = {.fd = open_file(path, size)};
    r.size = *size;
    if (*size >= 4 * LARGE_PAGE && *size < free_memory() / 2) {
        uint8_t *space = reserve(1, *size + LARGE_PAGE, path);
        size_t before = -(uintptr_t)space & (LARGE_PAGE - 1);
        r.data = space + before;
        if (before) munmap(space, before);
        large_pages(r.data, *size);
        parallel(read_task, &r, (int)((*size + LARGE_PAGE - 1) / LARGE_PAGE));
        mprotect(r.data, *size, PROT_READ);
    }
    close(r.fd);
    if (r.wrong)
        die("cannot read %s: %s", path, r.wrong > 0 ? strerror(r.wrong) : "it has become shorter");
    return r.data ? r.data : map_file(path, size);
}
#endif

// ---- SIMD. A vector has W lanes; a lane is a row of a weight panel, a position or a channel.
// GCC's and clang's vector types do the arithmetic; what they lack is below, once for each
// instruction set:
//     dot        acc[lane] += the four bytes of w[lane] times the four bytes at x
//     load_half  W half-precision numbers to float
// BIAS8 is what is added to int8 weights before dot, where dot takes unsigned weights.

#if defined __x86_64__ || defined __i386__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#define AVX512
#define AVX "AVX-512"
#define MM(name) _mm512_##name  // what has the same name in both but for the number
typedef __m512i mm;
enum { W = 16 };
#elif defined __AVX2__
#define AVX "AVX2"
#define MM(name) _mm256_##name
typedef __m256i mm;
enum { W = 8 };
#else
enum { W = 4 };
#endif

enum { HALVES = 16 / W };  // vectors of 16 rows or positions
typedef float vf __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")  // of loops over accumulators: these stay in registers
#endif

INLINE vf load(const void *p) { return *(const vf_unaligned *)p; }
INLINE vu load_u(const void *p) { return *(const vu_unaligned *)p; }
INLINE void store(void *p, vf v) { *(vf_unaligned *)p = v; }
INLINE vi splat_i(int32_t x) { return x - (vi){0}; }
// A single token waits for the weights. Fetched so many bytes ahead, they come up to 1.5 times as
// fast as without, and from four panels at once another 1.15 times.
enum { WEIGHTS_AHEAD = 3072, MAX_PANELS = W / 4, SUMS = W == 16 ? 16 : 12 };
// Into the second-level cache, which can wait for more of the memory at once than the first.
INLINE void prefetch(const uint8_t *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}
// Line i of `bytes` bytes, and each n-th after it.
INLINE void prefetch_every(const int n, const uint8_t *p, int i, int bytes) {
    for (i *= 64; i < bytes; i += n * 64) __builtin_prefetch(p + i, 0, 2);
}
// The same place of P panels, each `bytes` long; beyond their end of the next P.
INLINE void prefetch_panels(const int P, const uint8_t *panel, const uint8_t *next, size_t at,
                            size_t bytes, size_t size) {
    if (P > 1 && next + at >= panel + bytes) at += (size_t)(P - 1) * bytes;
    for (int p = 0; p < P; p++) prefetch(next + (size_t)p * bytes + at, size);
}
// Where vector h of a panel's 32-bit words begins; behind the first panel come the others.
INLINE size_t at_vector(int h, size_t bytes) {
    return (size_t)(h / HALVES) * bytes + (size_t)(h % HALVES * W * 4);
}
INLINE int32_t read_4(const int8_t *x) { int32_t v; memcpy(&v, x, 4); return v; }

#ifdef AVX512
INLINE vf load_half(const uint16_t *p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
#elif defined __AVX2__ && defined __F16C__
INLINE vf load_half(const uint16_t *p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
#elif defined __aarch64__
INLINE vf load_half(const uint16_t *p) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
#else
typedef uint16_t vh __attribute__((vector_size(2 * W)));
INLINE vf load_half(const uint16_t *p) {  // as half_to_float
    vh packed;
    memcpy(&packed, p, sizeof packed);
    vu h = __builtin_convertvector(packed, vu);
    vu x = (vu)((vf)((h & 0x7fff) << 13) * 0x1p112f);
    return (vf)(x | ((vu)((h & 0x7c00) == 0x7c00) & 0x7f800000) | (h & 0x8000) << 16);
}
#endif

#if (defined AVX512 && defined __AVX512VNNI__) ||                                                  \
    (defined __AVX2__ && !defined __AVX512BW__ &&                                                  \
     (defined __AVXVNNI__ || (defined __AVX512VNNI__ && defined __AVX512VL__)))
#define BIAS8 128
static const char isa[] = AVX " VNNI";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    return (vi)MM(dpbusd_epi32)((mm)acc, (mm)w, MM(set1_epi32)(read_4(x)));
}
#elif defined __AVX2__
// maddubs multiplies unsigned by signed bytes and adds pairs of the products to 16 bits, which hold
// the sum of a whole block of 4-bit weights: 32 / 2 * 15 * 127 < 2^15. (The empty asm keeps GCC
// from adding up in another order, for which the registers would not do.)
#define SHORT_SUMS 1
static const char isa[] = AVX;
#define MADDUBS(w, x) (vi) MM(maddubs_epi16)((mm)(w), (mm)(x))
INLINE vi sign(vi x, vu w) {
#ifdef AVX512
    return (vi)_mm512_mask_sub_epi8((mm)x, _mm512_movepi8_mask((mm)w), (mm){0}, (mm)x);
#else
    return (vi)_mm256_sign_epi8((mm)x, (mm)w);
#endif
}
INLINE vi add_pairs(vi sums) { return (vi)MM(madd_epi16)((mm)sums, (mm)splat_i(0x00010001)); }
INLINE vi dot_4bit(vi sums, vu w, const int8_t *x) {
    vs sum = (vs)sums + (vs)MADDUBS(w, splat_i(read_4(x)));
    __asm__("" : "+x"(sum));
    return (vi)sum;
}
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    acc += add_pairs(MADDUBS(MM(abs_epi8)((mm)w), sign(splat_i(read_4(x)), w)));
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
#elif defined __aarch64__
static const char isa[] = "NEON";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    int8x8_t xs = vreinterpret_s8_s32(vdup_n_s32(read_4(x)));
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8((int8x16_t)w), xs));
    int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8((int8x16_t)w), xs));
    return acc + (vi)vpaddq_s32(low, high);
}
#else
static const char isa[] = "generic";
INLINE vi dot(vi acc, vu w, const int8_t *x) {
    for (int k = 0; k < 4; k++) acc += ((vi)(w << (24 - 8 * k)) >> 24) * (int32_t)x[k];
    return acc;
}
#endif

// As dot, of bytes x that are not negative: so it needs neither a bias nor signs.
#ifdef BIAS8
INLINE vi dot_7bit(vi acc, vu w, const int8_t *x) {
    return (vi)MM(dpbusd_epi32)((mm)acc, MM(set1_epi32)(read_4(x)), (mm)w);
}
#elif defined SHORT_SUMS
INLINE vi dot_7bit(vi acc, vu w, const int8_t *x) {
    return acc + add_pairs(MADDUBS(splat_i(read_4(x)), w));
}
#else
#define dot_7bit dot
#endif
#ifndef BIAS8
#define BIAS8 0
#endif

// 16 numbers from 0 to 127 become bytes. (Without AVX-512, GCC 12 makes of the last of these one
// step for each byte.)
INLINE void store_bytes(uint8_t *to, const vi *x) {
#if defined __AVX2__ && !defined AVX512
    __m256i words = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
    words = _mm256_permute4x64_epi64(words, 0xd8);  // each half had its own four of both
    _mm_storeu_si128((__m128i *)(void *)to, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                                            _mm256_extracti128_si256(words, 1)));
#elif defined __SSE2__ && !defined AVX512
    _mm_storeu_si128((__m128i *)(void *)to,
                     _mm_packs_epi16(_mm_packs_epi32((__m128i)x[0], (__m128i)x[1]),
                                     _mm_packs_epi32((__m128i)x[2], (__m128i)x[3])));
#else
    typedef uint8_t vb __attribute__((vector_size(W)));
    for (int i = 0; i < HALVES; i++) {
        vb bytes = __builtin_convertvector(x[i], vb);
        memcpy(to + i * W, &bytes, W);
    }
#endif
}

// The largest of 16 floats that are not negative, compared as integers: a NaN is the largest.
INLINE uint32_t largest_of_16(const vi *x) {
#ifdef AVX512
    return _mm512_reduce_max_epu32((__m512i)x[0]);
#elif defined __AVX2__
    __m256i both = _mm256_max_epu32((__m256i)x[0], (__m256i)x[1]);
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));  // with the other half, then the neighbours
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)));
#else
    vu most = (vu)x[0];
    uint32_t max = 0;
    for (int h = 1; h < HALVES; h++) {
        vu larger = (vu)((vu)x[h] > most);
        most = ((vu)x[h] & larger) | (most & ~larger);
    }
    for (int i = 0; i < W; i++) max = most[i] > max ? most[i] : max;
    return max;
#endif
}

#ifndef SHORT_SUMS
#define SHORT_SUMS 0
#define dot_4bit dot
INLINE vi add_pairs(vi sums) { return sums; }
#endif

// ---- Quantized panels. H vectors of rows times T tokens; T, P, dtype and `packed` are constants
// where it is inlined. They read the weights as they lie in memory: `blocks`, and a single token
// those of P panels side by side. For many tokens, unpack_panel first makes plain bytes and float
// scales of weights of 4 bits: u, else NULL. What `next` points to, the next panel or what comes a
// little later, is fetched from memory meanwhile, `rate` bytes of each block: line by line between
// the products, since a core waits when it asks for many at once.

// Of unpacked weights a tile takes two vectors of rows, if a panel has so many, so that a token's
// numbers serve both.
enum { ABREAST = W < 16 ? 2 : 1, TOKENS = TILE / ABREAST };
typedef struct {
    uint8_t quants[64 * 512];           // [block][8][16][4]
    float scales[64][16], minima[64][16];
} Unpacked;                             // up to 64 blocks of a panel

INLINE void quant_kernel(const int T, const int P, const int dtype, const bool packed,
                         const uint8_t *blocks, const uint8_t *next, int rate, const Unpacked *u,
                         int lane, const Quantized *xq, int t0, int b0, int n_blocks, float *out,
                         int stride) {
    const int bias8 = dtype == Q4 ? 1 : dtype == Q8 ? BIAS8 / 8 : 0;  // eighths of the bias
    const bool late = SHORT_SUMS && dtype != Q8;  // the bias does not fit into 16 bits
    const int size = block_bytes(dtype);
    const int H = packed ? HALVES * P : ABREAST;  // vectors of rows; accumulator t * H + h
    const bool nibbles = packed && dtype != Q8;  // two weights in a byte
    const int G = nibbles ? 4 : 8;        // vectors of a row's quants
    const size_t bytes = (size_t)(n_blocks * size);  // of a panel
    vf acc[TILE];
#define OUT(i) (out + (size_t)((i) / H) * (size_t)stride + lane + (i) % H * W)
    for (int i = 0; i < T * H; i++)
        acc[i] = b0 ? load(OUT(i)) : (vf){0};
    size_t at = block_at(xq, t0, b0);
    for (int b = 0; b < n_blocks; b++, at += TILE) {
        const int8_t *x = xq->q + at * 32;
        // cppcheck-suppress [nullPointer, nullPointerArithmetic]
        const uint8_t *block = packed ? blocks + b * size : u->quants + b * 512;
        const uint8_t *quants = (packed ? block + scale_bytes(dtype) : block) + lane * 4;
        const uint8_t *soon = next ? next + b * size : NULL;
        if (P > 1 && soon && soon >= blocks + bytes) soon += (size_t)(P - 1) * bytes;
        vi sum[TILE];
        for (int i = 0; i < T * H; i++)
            sum[i] = splat_i(bias8 && !late ? xq->minus8[at + (size_t)(i / H)] : 0) *
                     (bias8 + !bias8);
        UNROLL for (int g = 0; g < G * H; g++) {
            vu w = load_u(quants + at_vector(g % H, bytes) + g / H * 64);
            vu high = w >> 4 & 0x0f0f0f0f;
            if (nibbles) w &= 0x0f0f0f0f;
            else if (packed && BIAS8 != 0) w ^= 0x80808080;
            if (soon && g % H % HALVES == 0)
                prefetch_every(G, soon + (size_t)(g % H / HALVES) * bytes, g / H, rate);
            for (int t = 0; t < T; t++) {
                const int8_t *from = x + t * 32 + g / H * 4;
                vi *to = &sum[t * H + g % H];
                *to = dtype == Q8 ? dot(*to, w, from) : dot_4bit(*to, w, from);
                if (nibbles) *to = dot_4bit(*to, high, from + 16);
            }
        }
        for (int i = 0; i < T * H; i++) {
            int h = lane + i % H % HALVES * W;
            size_t t = at + (size_t)(i / H);
            const void *panel = block + (size_t)(i % H / HALVES) * bytes;
            const uint16_t *halves = panel;
            if (late) sum[i] = add_pairs(sum[i]) + (bias8 ? xq->minus8[t] : 0);
            // cppcheck-suppress nullPointer
            vf scale = packed ? load_half(halves + h) : load(u->scales[b] + h);
            acc[i] += __builtin_convertvector(sum[i], vf) * scale * xq->d[t];
            if (dtype != Q4A) continue;
            // cppcheck-suppress nullPointer
            vf minimum = packed ? load_half(halves + 16 + h) : load(u->minima[b] + h);
            acc[i] += minimum * xq->dsum[t];
        }
    }
    for (int i = 0; i < T * H; i++) store(OUT(i), acc[i]);
#undef OUT
}

static void unpack_panel(Unpacked *u, int dtype, const uint8_t *block, int n_blocks) {
    for (int b = 0; b < n_blocks; b++, block += block_bytes(dtype)) {
        uint8_t *to = u->quants + b * 512;
        const uint8_t *from = block + scale_bytes(dtype);
        const uint16_t *halves = (const uint16_t *)(const void *)block;
        for (int i = 0; i < 256; i += 4 * W) {
            vu w = load_u(from + i);
            store(to + i, (vf)(w & 0x0f0f0f0f)), store(to + i + 256, (vf)(w >> 4 & 0x0f0f0f0f));
        }
        for (int i = 0; i < 16; i += W) {
            // cppcheck-suppress uninitvar  // it is written here
            store(u->scales[b] + i, load_half(halves + i));
            if (dtype == Q4A) store(u->minima[b] + i, load_half(halves + 16 + i));
        }
    }
}

// Writes BODY with constants: T = the tokens that are left, at most 8, and P = 1; for few tokens
// also with P = the panels of so many rows.
// NOLINTNEXTLINE(bugprone-macro-parentheses): a label cannot have parentheses
#define TILE_CASE(label, t, p, BODY)                                                               \
    label: {                                                                                       \
        enum { T = (t), P = W < 4 * (p) || HALVES * (t) * (p) > SUMS ? 1 : (p) };                  \
        BODY;                                                                                      \
    } break;
#define FOR_TILE(left, BODY)                                                                       \
    switch (left) {                                                                                \
        TILE_CASE(case 1, 1, 1, BODY) TILE_CASE(case 2, 2, 1, BODY) TILE_CASE(case 3, 3, 1, BODY)  \
        TILE_CASE(case 4, 4, 1, BODY) TILE_CASE(case 5, 5, 1, BODY) TILE_CASE(case 6, 6, 1, BODY)  \
        TILE_CASE(case 7, 7, 1, BODY) TILE_CASE(default, 8, 1, BODY)                               \
    }
#define FOR_PANELS_OF_1(rows, BODY)                                                                \
    switch (rows) { TILE_CASE(case 32, 1, 2, BODY) TILE_CASE(default, 1, 4, BODY) }
#define FOR_PANELS(n, rows, BODY)                                                                  \
    switch ((n) + (rows)) {                                                                        \
        TILE_CASE(case 33, 1, 2, BODY) TILE_CASE(case 34, 2, 2, BODY)                              \
        TILE_CASE(case 35, 3, 2, BODY) TILE_CASE(case 36, 4, 2, BODY)                              \
        TILE_CASE(case 37, 5, 2, BODY) TILE_CASE(case 38, 6, 2, BODY)                              \
        TILE_CASE(case 39, 7, 2, BODY) TILE_CASE(case 40, 8, 2, BODY)                              \
        TILE_CASE(case 65, 1, 4, BODY) TILE_CASE(case 66, 2, 4, BODY)                              \
        TILE_CASE(case 67, 3, 4, BODY) TILE_CASE(default, 4, 4, BODY)                              \
    }
static int tile_of(int left) { return left < TILE ? left : TILE; }

static void quant_tile(int dtype, const uint8_t *next, int rate, const Unpacked *u, int lane,
                       const Quantized *xq, int t, int some, int b0, int n_blocks, float *out,
                       int stride) {
#define KERNEL(type)                                                                               \
    quant_kernel(T * ABREAST <= TILE ? T : 1, P, type, false, NULL, next, rate, u, lane, xq, t,    \
                 b0, n_blocks, out, stride)
    if (dtype == Q4) FOR_TILE(some, KERNEL(Q4))
    else FOR_TILE(some, KERNEL(Q4A))
#undef KERNEL
}

static void quant_panel(const Matrix *w, const uint8_t *panel, const uint8_t *next, int rows,
                        const Quantized *xq, int n, float *out, int stride) {
    const uint8_t *from = next;
    int blocks = (w->cols + 31) / 32, t = 0, size = block_bytes(w->dtype), rate = size, part = 0;
#define KERNEL(type)                                                                               \
    quant_kernel(T * HALVES <= TILE ? T : 1, P, type, true, panel, next, rate, NULL, 0, xq, t, 0,  \
                 blocks, out + (size_t)t * (size_t)stride, stride)
    if (MAX_PANELS > 1 && rows > 16) {
        if (w->dtype == Q8) FOR_PANELS_OF_1(rows, KERNEL(Q8))
        else if (w->dtype == Q4) FOR_PANELS_OF_1(rows, KERNEL(Q4))
        else FOR_PANELS_OF_1(rows, KERNEL(Q4A))
        return;
    }
    bool unpacked = w->dtype != Q8 && n * HALVES * HALVES > 4 * TILE;
    int most = unpacked ? TOKENS : TILE / HALVES, tiles = (n + most - 1) / most;
    if (unpacked) tiles *= HALVES / ABREAST;
    rate = size / tiles < 64 ? 64 : round_up(size / tiles, 16);  // each fetches a part of a block
    if (!unpacked) {
        for (int some; t < n; t += some, part += rate) {
            some = n - t < most ? n - t : most;
            next = from && part < size ? from + part : NULL;
            if (w->dtype == Q8) FOR_TILE(some, KERNEL(Q8))
            else if (w->dtype == Q4) FOR_TILE(some, KERNEL(Q4))
            else FOR_TILE(some, KERNEL(Q4A))
        }
        return;
    }
#undef KERNEL
    for (int b = 0; b < blocks; b += 64, part = 0) {
        Unpacked u;
        int some = blocks - b < 64 ? blocks - b : 64, tokens;
        unpack_panel(&u, w->dtype, panel + b * size, some);
        for (int lane = 0; lane < 16; lane += W * ABREAST)
            for (t = 0; t < n; t += tokens, part += rate) {
                tokens = n - t < most ? n - t : most;
                next = from && part < size ? from + b * size + part : NULL;
                quant_tile(w->dtype, next, rate, &u, lane, xq, t, tokens, b, some,
                           out + (size_t)t * (size_t)stride, stride);
            }
    }
}

// ---- Float panels.

// w[i] becomes column i of W rows of float32 that lie one after the other, `cols` apart.
INLINE void load_columns(vf *w, const float *rows, size_t cols) {
#define ROW(r) (rows + (size_t)(r) * cols)
#ifdef AVX512
    UNROLL for (int r = 0; r < W; r++) w[r] = load(ROW(r));
    UNROLL for (int s = 1; s < W; s *= 2) {  // transposed by exchanging blocks of 1, 2, 4 and 8
        const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        vi low = lane + (((lane & s) != 0) & (W - s)), high = low + s;
        UNROLL for (int i = 0; i < W; i++) {
            if (i & s) continue;
            vf a = w[i], b = w[i | s];
            w[i] = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
            w[i | s] = (vf)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
        }
    }
#elif defined __AVX2__
    for (int i = 0; i < W; i += 4) {  // rows 0 to 3 in the lower halves, 4 to 7 in the upper ones
        __m256 x[4];
        UNROLL for (int r = 0; r < 4; r++)
            x[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(ROW(r) + i)),
                                        _mm_loadu_ps(ROW(r + 4) + i), 1);
        UNROLL for (int high = 0; high < 2; high++) {
            __m256d a = (__m256d)(high ? _mm256_unpackhi_ps(x[0], x[1])
                                       : _mm256_unpacklo_ps(x[0], x[1]));
            __m256d b = (__m256d)(high ? _mm256_unpackhi_ps(x[2], x[3])
                                       : _mm256_unpacklo_ps(x[2], x[3]));
            w[i + high * 2] = (vf)_mm256_unpacklo_pd(a, b);
            w[i + high * 2 + 1] = (vf)_mm256_unpackhi_pd(a, b);
        }
    }
#else
    for (int i = 0; i < W; i++) {
        vf column = {0};
        for (int r = 0; r < W; r++) column[r] = ROW(r)[i];
        w[i] = column;
    }
#endif
#undef ROW
}

// Sums that do not wait for each other are what a processor needs for few tokens; SUMS of them fit
// into its registers.
INLINE int rows_of(int dtype, int T, int P) {
    return dtype != ROWS && T * HALVES <= SUMS ? 16 * P : W;
}

// Writes the products of the columns from c to end to out, or adds them to what is there (`more`),
// and fetches `rate` bytes of `next`, unless it is NULL, with each column (of ROWS, the next rows).
INLINE void float_kernel(const int T, const int P, const int dtype, const uint8_t *panel,
                         const uint8_t *next, int rate, int cols, int n_rows, int lane, int c,
                         int end, const float *x, int x_stride, bool more, float *out, int stride) {
    enum { VECTORS = HALVES * MAX_PANELS };
    const int H = rows_of(dtype, T, P) / W;
    const size_t bytes = panel_bytes(dtype, cols);
    vf acc[24];
#define SUM(i) (out + (size_t)((i) / H) * (size_t)stride + lane + (i) % H * W)
    UNROLL for (int i = 0; i < T * H; i++) acc[i] = (vf){0};
    if (more)
        UNROLL for (int i = 0; i < T * H; i++) acc[i] = load(SUM(i));
    if (dtype == F32 || dtype == HALF) {
        for (; c < end; c++) {
            if (next && (dtype == F32 || c % 2 == 0))  // (of HALF, `next` is no next panel)
                prefetch_panels(P, dtype == F32 ? panel : next, next, (size_t)(c * rate), bytes,
                                64);
            vf v[VECTORS];
            UNROLL for (int h = 0; h < H; h++)
                v[h] = dtype == F32 ? load(panel + at_vector(h, bytes) + (c * 16 + lane) * 4)
                                    : load_half(halves(panel + at_vector(h, bytes * 2) / 2) +
                                                c * 16 + lane);
            UNROLL for (int i = 0; i < T * H; i++)
                // cppcheck-suppress uninitvar  // H is at least 1
                acc[i] += v[i % H] * x[i / H * x_stride + c];
        }
    } else if (dtype == BF16) {
        for (; c < end; c += 2) {
            if (next) prefetch_panels(P, panel, next, (size_t)(c * rate), bytes, 64);
            vu pair[VECTORS];
            UNROLL for (int h = 0; h < H; h++)
                pair[h] = load_u(panel + at_vector(h, bytes) + c * 32 + lane * 4);
            UNROLL for (int i = 0; i < T * H; i++)
                // cppcheck-suppress uninitvar  // H is at least 1
                acc[i] += (vf)(pair[i % H] << 16) * x[i / H * x_stride + c];
            if (c + 1 == end) break;  // an odd last column has padding beside it
            UNROLL for (int i = 0; i < T * H; i++)
                acc[i] += (vf)(pair[i % H] & 0xffff0000) * x[i / H * x_stride + c + 1];
        }
    } else {
        const float *rows = floats(panel) + (size_t)lane * (size_t)cols;
        for (; n_rows - lane >= W && c + W <= end; c += W) {
            vf w[W];
            for (int r = 0; r < W && next && c % 16 == 0; r++)  // the next rows
                prefetch((const uint8_t *)(rows + c + (size_t)(W + r) * (size_t)cols), 64);
            load_columns(w, rows + c, (size_t)cols);
            UNROLL for (int i = 0; i < W; i++)
                UNROLL for (int t = 0; t < T; t++) acc[t] += w[i] * x[t * x_stride + c + i];
        }
        for (; c < end; c++) {
            vf w = {0};
            for (int r = 0; r < W && lane + r < n_rows; r++)
                w[r] = rows[(size_t)r * (size_t)cols + (size_t)c];
            UNROLL for (int t = 0; t < T; t++) acc[t] += w * x[t * x_stride + c];
        }
    }
    UNROLL for (int i = 0; i < T * H; i++) store(SUM(i), acc[i]);
#undef SUM
}

// Does as many tokens as the registers allow, and returns how many.
static int float_tile(const Matrix *w, const uint8_t *panel, const uint8_t *next, int rate,
                      int n_rows, int c, int end, const float *x, int x_stride, int left, bool more,
                      float *out, int stride) {
#define KERNEL(type)                                                                               \
    for (int lane = 0; lane < n_rows; lane += rows_of(type, T, P), next = (type) ? NULL : next)    \
    float_kernel(T, P, type, panel, next, rate, w->cols, n_rows, lane, c, end, x, x_stride, more,  \
                 out, stride)
    if (W == 16 && left >= 12 && n_rows == 32) {  // 24 sums; an input serves two panels
        enum { T = 12, P = 2 };
        if (w->dtype == F32) KERNEL(F32);
        else if (w->dtype == HALF) KERNEL(HALF);
        else KERNEL(BF16);
        return 12;
    }
    if (W == 16 && left >= 16 && n_rows <= 16 && w->dtype != ROWS) {
        enum { T = 16, P = 1 };
        if (w->dtype == F32) KERNEL(F32);
        else if (w->dtype == HALF) KERNEL(HALF);
        else KERNEL(BF16);
        return 16;
    }
    left = W == 8 && left > 6 ? 6 : tile_of(left);
    if (MAX_PANELS > 1 && n_rows > 16) {
        if (w->dtype == F32) FOR_PANELS(left, n_rows, KERNEL(F32))
        else if (w->dtype == HALF) FOR_PANELS(left, n_rows, KERNEL(HALF))
        else FOR_PANELS(left, n_rows, KERNEL(BF16))
    } else if (w->dtype == F32) FOR_TILE(left, KERNEL(F32))
    else if (w->dtype == HALF) FOR_TILE(left, KERNEL(HALF))
    else if (w->dtype == BF16) FOR_TILE(left, KERNEL(BF16))
    else FOR_TILE(left, KERNEL(ROWS))
#undef KERNEL
    return left;
}

// So many panels are read together: several for one token, and where floats are multiplied.
static int panels_at_once(int dtype, int n) {
    int panels = n == 1 || dtype < Q8 ? MAX_PANELS : 1;
    while (panels > 1 && tile_of(n) * HALVES * panels > SUMS) panels /= 2;
    return dtype == ROWS ? 1 : panels;
}

// The products of a panel of `rows` rows, or of several panels, with n inputs: rows of out that are
// `stride` apart, with room for at least 16 numbers.
static void panel_products(const Matrix *w, const uint8_t *panel, const uint8_t *next, int rows,
                           const float *x, int x_stride, const Quantized *xq, int n, float *out,
                           int stride) {
    if (w->dtype >= Q8) {
        quant_panel(w, panel, next, rows, xq, n, out, stride);
        return;
    }
    // For many tokens some columns at a time, which stay in the L1 cache. Each tile of tokens
    // fetches a part of the same columns of the next panel.
    int step = n < 32 ? w->cols : 256, size = (int)panel_bytes(w->dtype, 2) / 2, rate = size;
    if (n > TILE && w->dtype != ROWS) rate = size * 16 / n < 4 ? 4 : size * 16 / n;
    rate = rate < size ? rate : size;
    for (int c = 0, end; c < w->cols; c = end) {
        const uint8_t *from = next ? next + c * (size - rate) : NULL;
        end = w->cols - c < step ? w->cols : c + step;
        for (int t = 0, part = 0; t < n; part += rate)
            t += float_tile(w, panel, from && part < size ? from + (end - c) * part : NULL, rate,
                            rows, c, end, x + (size_t)t * (size_t)x_stride, x_stride, n - t, c > 0,
                            out + (size_t)t * (size_t)stride, stride);
    }
}

static void rows_fast(const Matrix *w, int first, int rows, const float *x, int x_stride,
                      const Quantized *xq, int n, float *y, int stride) {
    float out[MAX_BATCH * 32];
    size_t bytes = panel_bytes(w->dtype, w->cols);
    bool whole = panels_at_once(w->dtype, n) * 16 >= rows && (rows == 32 || rows == 64);
    // Rows of y that lie a multiple of 4 KiB apart would share a set of the L1 cache.
    bool in_place = stride % 1024;
    for (int r = 0, some; r < rows; r += some) {
        const uint8_t *p = w->data + (size_t)((first + r) / 16) * bytes;
        some = whole ? rows : rows - r < 16 ? rows - r : 16;
        size_t ahead = n == 1 || (some > 16 && n <= TILE) ? WEIGHTS_AHEAD : bytes;
        bool direct = in_place && some >= 16;
        int wide = direct ? stride : some < 16 ? 16 : some;
        // cppcheck-suppress legacyUninitvar
        float *to = y + r, *from = direct ? to : out;
        panel_products(w, p, p + ahead, some, x, x_stride, xq, n, from, wide);
        for (int t = 0; t < n && !direct; t++, to += stride, from += wide)
            if (some == 16) memcpy(to, from, 16 * sizeof(float));
            else memcpy(to, from, (size_t)some * sizeof(float));
    }
}

// Rows are dealt out by so many panels, if then enough items are left for each thread.
static int rows_at_once(int n, int rows, int dtype) {
    int panels = panels_at_once(dtype, n);
    while (panels > 1 && rows / 128 / pool.n_threads < panels) panels /= 2;
    return 16 * panels;
}

// ---- Attention. A tile is a few slots of one sequence at consecutive positions; all query heads
// of a tile that share a key/value head pass over its keys and values together.

enum { MAX_QUERIES = 32, FEW = 8, AHEAD = 64 };  // few wait for memory: so far they prefetch
enum { MOST_Q = 4 };  // queries whose int8 values are summed at once: the sums fit into registers
// Slots, and the positions that any of them sees: [start, last] without [gap, end). A row of scores
// has `skip` positions of the gap less, a multiple of 16.
typedef struct { int slot, n, start, gap, end, skip, last; } AttendTile;
typedef struct {
    const Pass *f;
    const AttendTile *tiles;
    int n_tiles, group;        // query heads of a key/value head
    int phase, parts;          // into how many parts the phase cuts a tile
    bool crossed;              // values are fetched with the scores, keys with the values before
    size_t row, area;          // floats of a query's scores; of a tile's
} Attend;

// At most n blocks of 16 positions from block b of a row of scores on that lie together in memory.
// Of the block where a branch leaves the trunk, the positions from `split` on lie at `other`: it is
// a stretch of its own. (A gap begins where the branch does, so none lies within.)
typedef struct { int n, at, split, other_at; const uint8_t *chunk, *other; } Stretch;
static Stretch stretch_of(const Attend *a, const AttendTile *tile, int kv_head, int b, int n) {
    const Cache *kv = a->f->kv;
    int pos = b * 16 < tile->gap ? b * 16 : b * 16 + tile->skip;
    int seq = a->f->batch[tile->slot].seq, left = kv->from[seq] - pos;
    Stretch s = {0};
    s.chunk = cache_chunk(kv, seq, pos, a->f->layer, kv_head, &s.at);
    int most = CHUNK - s.at;
    if (left > 0 && left < 16 && pos + left <= tile->last) {
        s.split = left;
        s.other = cache_chunk(kv, seq, pos + left, a->f->layer, kv_head, &s.other_at);
        s.other_at &= ~15;
    }
    if (left > 0 && most > left) most = left < 16 ? 16 : left & ~15;
    s.n = n < most / 16 ? n : most / 16;
    return s;
}

// Products of n_panels panels of int8 keys with n queries, to out (n, stride). A core begins the
// next panel while it waits for the last one's sums. With each, `some` bytes of `next` are fetched,
// unless it is NULL; if `apart` is not 0, so many for each 16 columns, which lie that far apart.
static void score_panels(const Matrix *keys, const uint8_t *panel, int n_panels,
                         const uint8_t *next, size_t some, size_t apart, const Quantized *xq,
                         int n, float *out, int stride) {
    const size_t bytes = panel_bytes(Q8, keys->cols);
    int blocks = (keys->cols + 31) / 32, pieces = apart ? (keys->cols + 15) / 16 : 1;
#define KERNEL                                                                                     \
    for (int i = 0; i < n_panels; i++) {                                                           \
        for (int p = 0; next && p < pieces; p++)                                                   \
            prefetch(next + (size_t)i * some + (size_t)p * apart, some);                           \
        quant_kernel(T * HALVES <= TILE ? T : 1, 1, Q8, true, panel + (size_t)i * bytes, NULL, 0,  \
                     NULL, 0, xq, t, 0, blocks, out + i * 16, stride);                             \
    }
    for (int t = 0, tile; t < n; t += tile, out += (size_t)tile * (size_t)stride, next = NULL) {
        tile = n - t < TILE / HALVES ? n - t : TILE / HALVES;
        FOR_TILE(tile, KERNEL)
    }
#undef KERNEL
}

// Scores of the blocks of 16 positions from b0 to b1.
static void attend_scores(const Attend *a, const AttendTile *tile, int kv_head, float *scores,
                          int b0, int b1) {
    const Pass *f = a->f;
    const Config *c = &f->m->c;
    int hd = c->head_dim, n = tile->n * a->group;
    int most = n <= FEW && a->crossed ? b1 - b0 : AHEAD / 16;
    size_t bytes = panel_bytes(f->kv->key_dtype, hd), row = a->row;
    float *queries = resize(NULL, (size_t)(n * hd), sizeof(float)), out[MAX_BATCH * 16];
    Quantized rounded = new_quantized(n, hd);
    for (int i = 0; i < n; i++) {
        const float *q = row_of(f->s->q, tile->slot + i / a->group, c->n_heads * hd) +
                         (kv_head * a->group + i % a->group) * hd;
        if (f->kv->key_dtype == Q8) quantize(&rounded, i, q, hd);
        else memcpy(queries + i * hd, q, (size_t)hd * sizeof(float));
    }
    for (int b = b0, some; b < b1; b += some) {
        Stretch s = stretch_of(a, tile, kv_head, b, b1 - b < most ? b1 - b : most), later;
        Matrix keys = cache_keys(f->kv, s.chunk);
        const uint8_t *panel = keys.data + (size_t)(s.at / 16) * bytes, *next = NULL;
        float *to = scores + b * 16;
        some = s.n;
        if (n <= FEW && a->crossed) {
            next = cache_values(f->kv, s.chunk).data + s.at * 16;
        } else if (n <= FEW && (b + some) * 16 <= tile->last - tile->skip) {
            later = stretch_of(a, tile, kv_head, b + some, some);
            next = cache_keys(f->kv, later.chunk).data + (size_t)(later.at / 16) * bytes;
        }
        if (keys.dtype == Q8)
            score_panels(&keys, panel, some, next, a->crossed ? 16 * 16 : bytes,
                         a->crossed ? panel_bytes(Q8V, CHUNK) : 0, &rounded, n, to, (int)row);
        for (int i = 0; i < some && keys.dtype != Q8; i++)
            panel_products(&keys, panel + (size_t)i * bytes,
                           next ? next + (size_t)i * bytes : NULL, 16, queries, hd, &rounded, n,
                           to + i * 16, (int)row);
        for (int j = 0; j < n; j++)
            for (int l = 0; l < some * 16; l += W)
                store(to + (size_t)j * row + l, load(to + (size_t)j * row + l) * c->attn_scale);
        if (!s.split) continue;
        keys = cache_keys(f->kv, s.other), to += (some - 1) * 16;
        panel = keys.data + (size_t)(s.other_at / 16) * bytes;
        panel_products(&keys, panel, NULL, 16, queries, hd, &rounded, n, out, 16);
        for (int j = 0; j < n; j++, to += row)
            for (int l = s.split; l < 16; l++) to[l] = out[j * 16 + l] * c->attn_scale;
    }
    free(rounded.q);
    free(queries);
}

// A row of weights is rounded, as average_int8 says, where it lies: in the place of a block's 16
// floats there are 16 bytes, then the unit.
static void attend_round(const Attend *a, const AttendTile *tile, int kv_head, float *row) {
    int b0 = tile->start / 16, b1 = (tile->last - tile->skip) / 16 + 1;
    for (int b = b0, some; b < b1; b += some) {
        Stretch s = stretch_of(a, tile, kv_head, b, b1 - b);
        some = s.n;
        Matrix values = cache_values(a->f->kv, s.chunk);
        const float *scales = column_scales(&values) + s.at;
        float both[16], max[CHUNK / 16] = {0}, inverse[CHUNK / 16], unit[CHUNK / 16];
        if (s.split) {
            values = cache_values(a->f->kv, s.other);
            memcpy(both, column_scales(&values) + s.other_at, sizeof both);
            scales = memcpy(both, scales, (size_t)s.split * sizeof(float));
        }
        float *block = row + b * 16;
        for (int i = 0; i < some; i++) {
            vi scaled[HALVES];
            for (int h = 0; h < HALVES; h++) {
                vf x = load(block + i * 16 + h * W);
                scaled[h] = (vi)(x * load(scales + i * 16 + h * W)) & (vi)(x != 0);
                store(block + i * 16 + h * W, (vf)scaled[h]);
            }
            max[i] = float_of(largest_of_16(scaled));
        }
        for (int i = 0; i < CHUNK / 16; i++) {  // (of all, so that it becomes SIMD)
            unit[i] = scale_of(&max[i], 1, 127);
            inverse[i] = unit[i] > 0 ? 1.0f / unit[i] : 0.0f;
        }
        for (int i = 0; i < some; i++, block += 16) {
            vi w[HALVES];
            for (int h = 0; h < HALVES; h++)
                w[h] = (vi)(load(block + h * W) * inverse[i] + 12582912.0f) - 0x4b400000;
            store_bytes((uint8_t *)block, w);
            block[4] = unit[i];
        }
    }
}

// V vectors of channels of 16 * blocks int8 values, times the rounded weights of Q queries, are
// added to out (Q, wide). For each panel as much is fetched, `apart` bytes apart.
INLINE void int8_kernel(const int Q, const int V, const uint8_t *values, const uint8_t *next,
                        size_t apart, const float *x, size_t stride, int blocks, float *out,
                        int wide) {
    const size_t bytes = panel_bytes(Q8V, CHUNK);
    for (int b = 0; b < blocks; b++, x += 16) {
        vi sum[2 * MOST_Q] = {{0}};
        UNROLL for (int g = 0; g < 4; g++) {  // 4 positions
            vu v[2];
            int at = (b * 4 + g) * 64;
            if (next) prefetch_panels(V > HALVES ? 2 : 1, next, next, (size_t)at, apart, 64);
            UNROLL for (int h = 0; h < V; h++) v[h] = load_u(values + at_vector(h, bytes) + at);
            UNROLL for (int i = 0; i < Q * V; i++)
                // cppcheck-suppress uninitvar  // V is at least 1
                sum[i] = dot_7bit(sum[i], v[i % V],
                                  (const int8_t *)(x + (size_t)(i / V) * stride) + g * 4);
        }
        UNROLL for (int i = 0; i < Q * V; i++) {
            float *to = out + i / V * wide + i % V * W, unit = x[(size_t)(i / V) * stride + 4];
            store(to, load(to) + __builtin_convertvector(sum[i], vf) * unit);
        }
    }
}
static void int8_average(const uint8_t *values, const uint8_t *next, size_t apart, const float *x,
                         size_t stride, int n, int blocks, float *out, int wide) {
#define CASE(Q, V)                                                                                 \
    case (Q) * 2 + (V):                                                                            \
        int8_kernel(Q, V, values + at,                                                             \
                    next && !j && i % 16 == 0 ? next + (size_t)(i / 16) * apart : NULL, apart,     \
                    x + (size_t)j * stride, stride, blocks, out + j * wide + i, wide);             \
        break;
    for (int i = 0, v; i < wide; i += v * W) {
        size_t at = (size_t)(i / 16) * panel_bytes(Q8V, CHUNK) + (size_t)(i % 16) * 4;
        v = wide - i < 2 * W ? 1 : 2;
        for (int j = 0; j < n; j += MOST_Q)
            switch ((n - j < MOST_Q ? n - j : MOST_Q) * 2 + v) {
                CASE(1, 1) CASE(1, 2) CASE(2, 1) CASE(2, 2)
                CASE(3, 1) CASE(3, 2) CASE(4, 1) CASE(4, 2)
            }
    }
#undef CASE
}

// As attend_mix, of int8 values.
static void attend_mix_int8(const Attend *a, int pair, const float *scores, int p0, int p1,
                            float *out) {
    const Pass *f = a->f;
    const Config *c = &f->m->c;
    int kv_head = pair / a->n_tiles, soon = pair + a->crossed;  // what is fetched
    const AttendTile *tile = &a->tiles[pair % a->n_tiles], *then = &a->tiles[soon % a->n_tiles];
    size_t keys = panel_bytes(f->kv->key_dtype, c->head_dim);
    int n = tile->n * a->group, wide = (p1 - p0) * 16;
    int b0 = tile->start / 16, b1 = (tile->last - tile->skip) / 16 + 1;
    size_t first = (size_t)p0 * panel_bytes(Q8V, CHUNK);
    for (int b = b0, run; b < b1; b += run) {
        Stretch s = stretch_of(a, tile, kv_head, b, b1 - b), later;
        run = s.n;
        const uint8_t *next = NULL;
        size_t apart = panel_bytes(Q8V, CHUNK);
        int ahead = a->crossed ? b : b + run;
        if (n <= FEW && soon < a->n_tiles * c->n_kv_heads && ahead * 16 >= then->start &&
            ahead * 16 <= then->last - then->skip) {
            later = stretch_of(a, then, soon / a->n_tiles, ahead, run);
            next = cache_values(f->kv, later.chunk).data + first + later.at * 16;
            if (a->crossed) {
                next = cache_keys(f->kv, later.chunk).data + (size_t)(later.at / 16) * keys;
                apart = (size_t)run * keys / (size_t)(p1 - p0);
            }
        }
        const uint8_t *values = cache_values(f->kv, s.chunk).data + first + s.at * 16;
        uint8_t *both = NULL;
        if (s.split) {  // positions below s.split of `values`, the others of s.other
            both = resize(NULL, (size_t)wide, CHUNK);  // a block of panels as far apart as others
            const uint8_t *other = cache_values(f->kv, s.other).data + first + s.other_at * 16;
            for (int p = 0; p < p1 - p0; p++)
                for (int i = 0; i < 256; i += 4 * W) {
                    size_t from = (size_t)p * panel_bytes(Q8V, CHUNK) + (size_t)i;
                    int left = s.split - i / 64 * 4;  // of the 4 positions in a word
                    uint32_t mask = left >= 4 ? ~0u : left < 1 ? 0 : (1u << 8 * left) - 1;
                    vu mixed = (load_u(values + from) & mask) | (load_u(other + from) & ~mask);
                    store(both + from, (vf)mixed);
                }
            values = both;
        }
        int8_average(values, next, apart, scores + b * 16, a->row, n, run, out, wide);
        free(both);
    }
}

// Scores of one query become weights; positions that it does not see get weight 0.
static void attend_softmax(const Attend *a, const AttendTile *tile, int kv_head, float *scores,
                           int query) {
    float *row = scores + (size_t)query * a->row;
    const Slot *slot = &a->f->batch[tile->slot + query / a->group];
    Sight seen = sight(a->f->kv, a->f->layer, slot);
    seen.end -= tile->skip;
    if (seen.start >= tile->end) seen.start -= tile->skip, seen.gap -= tile->skip;
    int n = slot->pos + 1 - tile->skip, end = round_up(tile->last + 1 - tile->skip, 32);
    if (seen.gap == seen.end) {  // the rest is the gap: so there are whole vectors only
        row[end - 1] = row[n - 1];
        softmax_without(row, seen.start, n, end, end);
    } else {
        softmax_without(row, seen.start, seen.gap, seen.end, n);
        for (int t = n; t < end; t++) row[t] = 0;
    }
    for (int t = tile->start & ~15; t < seen.start; t++) row[t] = 0;
    if (a->f->kv->value_dtype == Q8V) attend_round(a, tile, kv_head, row);
}

// The weighted average of the values, for the panels of 16 channels from p0 to p1.
static void attend_mix(const Attend *a, int pair, const float *scores, int p0, int p1,
                       float *out) {
    const Pass *f = a->f;
    const AttendTile *tile = &a->tiles[pair % a->n_tiles];
    int kv_head = pair / a->n_tiles, n = tile->n * a->group, most = n <= FEW ? 2 * AHEAD : AHEAD;
    int seq = f->batch[tile->slot].seq, from = f->kv->from[seq], wide = (p1 - p0) * 16, at;
    size_t bytes = panel_bytes(f->kv->value_dtype, CHUNK), column = bytes / CHUNK;
    for (int t = tile->start, run; t <= tile->last; t += run) {  // positions that lie together
        if (t == tile->gap) t = tile->end;
        Matrix values = cache_values(f->kv, cache_chunk(f->kv, seq, t, f->layer, kv_head, &at));
        const uint8_t *panel = values.data + (size_t)at * column, *next = NULL;
        run = CHUNK - at < tile->last + 1 - t ? CHUNK - at : tile->last + 1 - t;
        if (t < from && t + run > from) run = from - t;
        run = run < most ? run : most;
        if (n <= FEW && t + run <= tile->last) {
            Matrix later =
                cache_values(f->kv, cache_chunk(f->kv, seq, t + run, f->layer, kv_head, &at));
            next = later.data + (size_t)at * column;
        }
        const float *weights = scores + (t < tile->end ? t : t - tile->skip);
        for (int p = p0, some; p < p1; p += some) {
            some = panels_at_once(values.dtype, n);
            while (some > p1 - p) some /= 2;
            for (int j = 0; j < n;)
                j += float_tile(&values, panel + (size_t)p * bytes,
                                next && !j ? next + (size_t)p * bytes : NULL, (int)column,
                                16 * some, 0, run, weights + (size_t)j * a->row, (int)a->row,
                                n - j, true, out + j * wide + (p - p0) * 16, wide);
        }
    }
}

// Phase 0 does a tile and key/value head as a whole, with the thread's own scratch. Where there are
// few of these, phases 1 to 3 cut each into parts instead: by positions, by queries, by channels.
enum { PART_BLOCKS = 16 };  // blocks of positions
static void attend_part(void *context, int item) {
    const Attend *a = context;
    int pair = item / a->parts, part = item % a->parts, kv_head = pair / a->n_tiles;
    const AttendTile *tile = &a->tiles[pair % a->n_tiles];
    float *scores = a->f->s->scores + (size_t)(a->phase ? pair : this_thread) * a->area;
    int b0 = tile->start / 16, b1 = (tile->last - tile->skip) / 16 + 1, n = tile->n * a->group;
    int hd = a->f->m->c.head_dim, q_dim = a->f->m->c.n_heads * hd, p0 = 0, p1 = (hd + 15) / 16;
    if (a->phase == 1) b0 += part * PART_BLOCKS, b1 = b0 + PART_BLOCKS < b1 ? b0 + PART_BLOCKS : b1;
    if (a->phase == 3) p0 = part, p1 = part + 1;
    if (a->phase <= 1 && b0 < b1) attend_scores(a, tile, kv_head, scores, b0, b1);
    if (a->phase == 0)
        for (int j = 0; j < n; j++) attend_softmax(a, tile, kv_head, scores, j);
    if (a->phase == 2 && part < n) attend_softmax(a, tile, kv_head, scores, part);
    if (a->phase == 1 || a->phase == 2) return;
    int wide = (p1 - p0) * 16, most = hd - p0 * 16 < wide ? hd - p0 * 16 : wide;
    float *out = zeros((size_t)(n * wide), sizeof(float));
    (a->f->kv->value_dtype == Q8V ? attend_mix_int8 : attend_mix)(a, pair, scores, p0, p1, out);
    for (int j = 0; j < n; j++) {
        float *to = row_of(a->f->s->att_out, tile->slot + j / a->group, q_dim) +
                    (kv_head * a->group + j % a->group) * hd + p0 * 16;
        memcpy(to, out + j * wide, (size_t)most * sizeof(float));
    }
    free(out);
}

static void attention_fast(const Pass *f) {
    const Config *c = &f->m->c;
    AttendTile tiles[MAX_BATCH];
    Attend a = {.f = f, .tiles = tiles, .group = c->n_heads / c->n_kv_heads};
    int most = a.group <= 4 ? 8 : a.group > MAX_QUERIES ? 1 : MAX_QUERIES / a.group;
    if (a.group > MAX_BATCH) { attention_plain(f); return; }
    int longest = 0, widest = 1;
    for (int i = 0; i < f->n; i++) {
        const Slot *slot = &f->batch[i];
        AttendTile *tile = &tiles[a.n_tiles - (a.n_tiles > 0)];
        if (a.n_tiles && tile->n < most && slot[-1].seq == slot->seq &&
            slot[-1].pos + 1 == slot->pos) {
            tile->last = slot->pos;
            if (++tile->n > widest) widest = tile->n;
        } else {
            Sight s = sight(f->kv, f->layer, slot);
            int skip = (s.end & ~15) - round_up(s.gap, 16);
            if (skip < 0 || s.gap == s.end) skip = 0;
            tile = &tiles[a.n_tiles++];
            *tile = (AttendTile){i, 1, s.start, s.gap, s.end, skip, slot->pos};
        }
        if (slot->pos >= longest + tile->skip) longest = slot->pos + 1 - tile->skip;
    }
    int pairs = a.n_tiles * c->n_kv_heads, threads = pool.n_threads;
    bool phases = pairs < 4 * threads && threads > 1 && (longest > 256 || longest * widest > 1024);
    a.crossed = !phases && f->kv->value_dtype == Q8V &&  // if they stay in the L2 cache so long
                f->kv->head_bytes / CHUNK * (size_t)longest <= 1 << 18;
    a.row = (size_t)round_up(longest, 16) + 16;
    a.area = a.row * (size_t)(a.group * most);
    size_t need = a.area * (size_t)(phases ? pairs : threads);
    if (need > f->s->scores_capacity) {
        f->s->scores_capacity = need + need / 4;
        f->s->scores = resize(f->s->scores, f->s->scores_capacity, sizeof(float));
    }
    int parts[] = {1, (longest - 1) / (16 * PART_BLOCKS) + 2, a.group * widest,
                   (c->head_dim + 15) / 16};
    for (a.phase = phases; a.phase <= 3 * phases; a.phase++) {
        a.parts = parts[a.phase];
        parallel(attend_part, &a, pairs * a.parts);
    }
}

#else
static const char isa[] = "plain C";
static void start_threads(int n) { (void)n; }
#endif

// =================================================================================================
// Part 4. What to do with it
// =================================================================================================

enum { MAX_OTHERS = 15 };
typedef struct {
    const char *model, *tokenizer, *prompt, *prompt_file, *output, *mode, *system, *draft, *session;
    const char *tool, *others[MAX_OTHERS];
    int n_others;
    long long steps, context, threads, top_k, samples, layer, head;
    double temperature, top_p;  // -1: as the tokenizer's file says
    double min_p, repeat_penalty;
    unsigned long long seed;
    bool quiet, receipt, best, think, trace, help, version;
    double started;  // not an option: when the program was
} Options;

static volatile sig_atomic_t interrupted;  // by a signal; a second one ends the program
static volatile sig_atomic_t idle = 1;     // nothing is under way: the first one does

// ---- Input and output

// Where results go: stdout, or a file that gets its name only when it is complete.
typedef struct {
    int fd;
    const char *path;
    char *temporary;    // its name until it is complete, and in the same block:
    char *target;       // the name that it then gets
    char held[4];       // the first bytes of an unfinished UTF-8 character
    size_t n_held;
    char *memory;       // with fd -1 results go here
    size_t n, capacity, start;  // start: where the model's own text begins
    bool terminal;      // control characters are shown instead of sent
    bool filter, thinking, show_thoughts;  // <think> is looked for; is open; is not left out
    size_t matched;     // characters of the next such tag that have come
} Output;
// Files that are not whole yet: that of -o, a new session's, that of /save. Removed at exit.
static volatile struct { char *temporary; int fd; } unfinished[3];
static volatile sig_atomic_t n_unfinished;
static volatile pid_t running_tool;  // ends with the program
static int dimmed;             // a terminal, or 0, that writes dimmed text: set back at exit

static void remove_unfinished(void) {
    if (running_tool > 0) kill(-running_tool, SIGKILL);
    for (int i = 0; i < n_unfinished; i++) unlink(unfinished[i].temporary);
    if (dimmed && write(dimmed, "\033[0m", 4) < 0) {}
}

static Output open_output(const char *path) {
    Output out = {.fd = 1, .path = path && strcmp(path, "-") ? path : NULL};
    out.terminal = !out.path && isatty(1);
    if (!out.path) return out;
    struct stat st;
    bool exists = !stat(path, &st);
    if (exists && !S_ISREG(st.st_mode)) {
        out.fd = open(path, O_WRONLY | O_CLOEXEC);  // a device or a pipe: written to as it is
        out.terminal = out.fd >= 0 && isatty(out.fd);
    } else {
        char *real = realpath(path, NULL);  // where a link leads to; NULL: there is no file yet
        const char *name = real ? real : path;
        size_t size = strlen(name) + sizeof ".XXXXXX";
        out.temporary = resize(NULL, 2, size);
        out.target = out.temporary + size;
        snprintf(out.temporary, size, "%s.XXXXXX", name);
        snprintf(out.target, size, "%s", name);
        free(real);
        sigset_t all, old;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);  // a signal finds no file, or knows its name
        out.fd = mkstemp(out.temporary);
        if (out.fd >= 0) {
            unfinished[n_unfinished].temporary = out.temporary;
            unfinished[n_unfinished].fd = out.fd;
            n_unfinished++;
        }
        pthread_sigmask(SIG_SETMASK, &old, NULL);
    }
    if (out.fd < 0) free(out.temporary);
    if (out.fd < 0) die("cannot write %s: %s", path, strerror(errno));
    if (!out.temporary) return out;
    mode_t mask = umask(0);
    umask(mask);
    fchmod(out.fd, exists ? st.st_mode & 0777 : 0666 & ~mask);
    fcntl(out.fd, F_SETFD, FD_CLOEXEC);
    return out;
}
static void write_output(Output *out, const void *data, size_t n) {
    if (out->fd < 0 && n) {
        if (out->capacity - out->n < n)
            out->memory = resize(out->memory, out->capacity = 2 * (out->n + n), 1);
        memcpy(out->memory + out->n, data, n);
        out->n += n;
        return;
    }
    for (const char *p = data; n;) {
        ssize_t wrote = write(out->fd, p, n);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0 && errno == EPIPE && !recovery) exit(0);  // the reader has seen enough
        if (wrote < 0)
            die("cannot write %s: %s", out->path ? out->path : "stdout", strerror(errno));
        p += wrote;
        n -= (size_t)wrote;
    }
}
static void close_output(Output *out) {
    if (!out->path) return;
    int failed = out->temporary ? fsync(out->fd) : 0;
    failed |= close(out->fd);
    failed = failed || (out->temporary && rename(out->temporary, out->target));
    if (failed) die("cannot write %s: %s", out->path, strerror(errno));
    if (out->temporary) n_unfinished--;
    free(out->temporary);
}

// Writes text as it comes, but holds an unfinished character at its end back until the rest is
// there. On a terminal, control characters have no effect: they are written as ^C (and those of
// U+0080 to U+009F as spaces).
static void write_text(Output *out, Text text) {
    char s[4096];
    while (text.len) {
        size_t n = out->n_held, back = 0;
        memcpy(s, out->held, n);
        for (; n < sizeof s - 1 && text.len; text.s++, text.len--) {
            uint8_t c = (uint8_t)text.s[0];
            if (out->terminal && ((c < 32 && c != '\n' && c != '\t') || c == 127)) {
                s[n++] = '^';
                c ^= 64;
            } else if (out->terminal && n && (uint8_t)s[n - 1] == 0xc2 && c >> 5 == 4) c = 0xa0;
            s[n++] = (char)c;
        }
        // The bytes at the end that begin a character and do not finish it.
        for (size_t i = 1; i <= 3 && i <= n && !back; i++) {
            uint8_t c = (uint8_t)s[n - i];
            if (c >= 0xc0 && i < (c < 0xe0 ? 2u : c < 0xf0 ? 3u : 4u)) back = i;
            if ((c & 0xc0) != 0x80) break;
        }
        write_output(out, s, n - back);
        memcpy(out->held, s + n - back, back);
        out->n_held = back;
    }
}

static void set_thinking(Output *out, bool thinking) {
    out->thinking = thinking;
    if (!out->terminal) return;
    if (out->fd >= 0) dimmed = thinking ? out->fd : 0;
    write_output(out, thinking ? "\033[2m" : "\033[0m", 4);
}

static const char *next_tag(const Output *out) { return out->thinking ? "</think>" : "<think>"; }

static void write_shown(Output *out, const char *s, size_t n) {
    if (!out->thinking || out->show_thoughts) write_text(out, (Text){s, n});
}

// Writes text of the model. What reasoning models write between <think> and </think> is dimmed on a
// terminal, and left out elsewhere unless it is asked for.
static void write_reply(Output *out, Text text) {
    for (size_t n; text.len && out->filter; text.s += n, text.len -= n) {
        const char *tag = next_tag(out);
        n = 0;
        if (text.s[0] == tag[out->matched]) {
            n = 1;
            out->matched++;
        } else {  // what matched was the beginning of another word
            write_shown(out, tag, out->matched);
            out->matched = 0;
            while (n < text.len && text.s[n] != '<') n++;
            write_shown(out, text.s, n);
        }
        if (tag[out->matched]) continue;
        if (!out->thinking) set_thinking(out, true);
        write_shown(out, tag, out->matched);
        if (tag[1] == '/') set_thinking(out, false);
        out->matched = 0;
    }
    write_text(out, text);
}

// Begins the model's text behind a prompt, which may have opened a thought.
static void start_thoughts(Output *out, const Options *o, bool filter, Text prompt) {
    out->filter = filter;
    out->show_thoughts = o->think || out->terminal;
    out->start = out->n;
    out->matched = 0;
    bool thinking = false;
    for (size_t i = 0; filter && i + 7 <= prompt.len; i++) {
        if (!memcmp(prompt.s + i, "<think>", 7)) thinking = true;
        if (!memcmp(prompt.s + i, "</think", 7)) thinking = false;
    }
    if (thinking) set_thinking(out, true);
}

// Ends it: with what is held back, and a newline.
static void end_text(Output *out) {
    write_shown(out, next_tag(out), out->matched);
    if (out->thinking) set_thinking(out, false);
    write_output(out, out->held, out->n_held);
    out->n_held = 0;
    write_output(out, "\n", 1);
}

// The last part of a path; *folder tells what the others name.
static const char *last_part(const char *path, struct stat *folder) {
    const char *slash = strrchr(path, '/');
    char *parent = slash ? strndup(path, (size_t)(slash - path) + 1) : NULL;
    if (stat(parent ? parent : ".", folder)) memset(folder, 0, sizeof *folder);
    free(parent);
    return slash ? slash + 1 : path;
}

// Whether two paths name one file, or would.
static bool same_file(const char *a, const char *b) {
    struct stat x, y;
    if (!a || !b || !strcmp(a, "-") || !strcmp(b, "-")) return false;
    bool there = !stat(a, &x);
    if (there != !stat(b, &y)) return false;
    if (there && !S_ISREG(x.st_mode)) return false;
    if (!there && strcmp(last_part(a, &x), last_part(b, &y))) return false;
    return x.st_ino && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// What a mode reads: a file, stdin, or the text of -i.
typedef struct {
    int fd;
    const char *name;
    Text text;    // of -i, if its s is not NULL
    double size;  // of a file; 0: unknown
} Input;

static Input open_input(const Options *o) {
    const char *path = o->prompt_file ? o->prompt_file : o->prompt ? o->prompt : "-";
    Input in = {.name = path};
    struct stat st;
    if (!strcmp(path, "-")) in.name = "stdin";
    else if (!o->prompt_file) in.text = (Text){path, strlen(path)}, in.name = "the text of -i";
    else if ((in.fd = open(path, O_RDONLY)) < 0) die("cannot open %s: %s", path, strerror(errno));
    if (!in.text.s && !fstat(in.fd, &st) && S_ISREG(st.st_mode)) in.size = (double)st.st_size;
    return in;
}
// Reads n bytes, or what there is up to the end.
static size_t read_input(Input *in, void *data, size_t n) {
    size_t done = 0;
    if (in->text.s) {
        done = n < in->text.len ? n : in->text.len;
        memcpy(data, in->text.s, done);
        in->text.s += done, in->text.len -= done;
        return done;
    }
    while (done < n) {
        idle = 1;  // the reading may wait for long
        if (interrupted) exit(130);
        ssize_t got = read(in->fd, (char *)data + done, n - done);
        idle = 0;
        if (got < 0) die("cannot read %s: %s", in->name, strerror(errno));
        if (got == 0) break;
        done += (size_t)got;
    }
    return done;
}
static void close_input(Input *in) { if (in->fd > 0) close(in->fd); }

// The text of -f or -i, followed by a zero byte.
static Text input_text(const Options *o) {
    char *s = NULL;
    size_t n = 0, capacity = 0;
    if (!o->prompt && !o->prompt_file) return (Text){zeros(1, 1), 0};
    Input in = open_input(o);
    while (n + 1 >= capacity) {
        s = resize(s, capacity = capacity * 2 + 65536, 1);
        n += read_input(&in, s + n, capacity - n - 1);
    }
    close_input(&in);
    s[n] = 0;
    return (Text){s, n};
}

// A line on the terminal's stderr: how much is done, how fast, how long it still takes.
typedef struct { bool on; double began, shown; } Progress;
static void show_progress(Progress *p, double part, double bytes) {
    double now = seconds(), took = now - p->began, left = took / part - took;
    if (!p->on || now - p->shown < 0.2) return;
    p->shown = now;
    if (part > 0 && left < 1e6)
        fprintf(stderr, "\r%3.0f%%  %.0f bytes/s  %d:%02d left  ", 100 * part, bytes / took,
                (int)left / 60, (int)left % 60);
    else fprintf(stderr, "\r%.0f bytes  %.0f bytes/s  ", bytes, bytes / took);
}
static void end_progress(const Progress *p) { if (p->on) fprintf(stderr, "\r%50s\r", ""); }

static int context_of(const Options *o, const Model *m) {
    if (o->context > m->c.seq_len)
        die("-c %lld is more than the %d positions that %s was made for", o->context, m->c.seq_len,
            m->path);
    return o->context ? (int)o->context : m->c.seq_len;
}

// Runs tokens ids[from..to) at their positions through the model, MAX_BATCH at a time; returns the
// logits of the last one.
static float *prefill(const Model *m, Cache *kv, int seq, const int *ids, int from, int to) {
    Slot batch[MAX_BATCH];
    float *logits = NULL;
    for (int n = 0; from < to && !interrupted; from += n) {
        n = to - from < MAX_BATCH ? to - from : MAX_BATCH;
        for (int i = 0; i < n; i++)
            batch[i] = (Slot){ids[from + i], from + i, seq, from + i == to - 1};
        logits = forward(m, kv, batch, n);
    }
    return logits;
}

// ---- chat format: how a conversation is written down for the model

// Appends a text to a growing prompt; `typed` marks what a user typed (no special tokens there).
typedef struct { char *s, *typed; size_t n; } Prompt;
static void append(Prompt *p, Text text, bool typed) {
    p->s = resize(p->s, p->n + text.len + 1, 1);
    p->typed = resize(p->typed, p->n + text.len + 1, 1);
    if (text.len) memcpy(p->s + p->n, text.s, text.len);
    memset(p->typed + p->n, typed, text.len);
    p->n += text.len;
    p->s[p->n] = 0;
}

// Appends a user's turn, and before the first one the system's (system.s NULL: the model's
// default). Returns where the user's begins.
static size_t append_turn(Prompt *p, const Tokenizer *t, bool first, Text system, Text user) {
    const Text *c = t->chat;
    int before = !first ? LATER_BEFORE : system.s ? USER_BEFORE_SYSTEM : USER_BEFORE;
    if (first && system.s) {
        append(p, c[SYSTEM_BEFORE], false);
        append(p, system, true);
        append(p, c[SYSTEM_AFTER], false);
    } else if (first) append(p, c[DEFAULT_SYSTEM], false);
    size_t start = p->n;
    append(p, c[before], false);
    append(p, user, true);
    append(p, c[before + 1], false);
    return start;
}

static Sampler new_sampler(const Options *o, const Model *m, const Tokenizer *t) {
    Sampler s = {.temperature = (float)o->temperature, .top_p = (float)o->top_p,
                 .top_k = (int)o->top_k, .min_p = (float)o->min_p,
                 .repeat_penalty = (float)o->repeat_penalty, .rng = o->seed,
                 .vocab_size = m->c.vocab_size};
    if (o->temperature < 0) s.temperature = t->h.temperature >= 0 ? t->h.temperature : 1;
    if (o->top_p < 0) s.top_p = t->h.top_p >= 0 ? t->h.top_p : 0.9f;
    if (!s.rng) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        s.rng = mix64((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
        s.rng += !s.rng;
    }
    return s;
}

// Writes a token's text. Of its tokens of a single byte, llama2.c prints only printable ones.
static void write_token(Output *out, const Tokenizer *t, int previous, int id) {
    Text text = decode(t, previous, id);
    uint8_t c = text.len == 1 ? (uint8_t)text.s[0] : ' ';
    if (t->llama2c && (c < 9 || (c > 13 && c < 32) || c > 126)) return;
    write_reply(out, text);
}

// ---- How likely a text is

// Natural logarithm of x > 0: x = 2^e m, ln m = 2 artanh((m - 1) / (m + 1)).
static double log_(double x) {
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752) m *= 2, e--;
    double f = (m - 1) / (m + 1), f2 = f * f, sum = 0;
    for (int i = 21; i > 0; i -= 2) sum = sum * f2 + 1.0 / i;
    return 2 * f * sum + e * 0.69314718055994531;
}

// -ln p(target) from logits (n): ln(sum of e^(x - max)) - (x[target] - max).
static double surprise(const float *logits, int n, int target) {
    float max = logits[argmax(logits, n)];
    double sums[16] = {0}, sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += (double)exp_(logits[i + j] - max);
    for (; i < n; i++) sums[i % 16] += (double)exp_(logits[i] - max);
    for (int j = 0; j < 16; j++) sum += sums[j];
    return log_(sum) - (double)(logits[target] - max);
}

typedef struct { const float *logits; int vocab_size; const int *targets; double *nll; } Score;
static void surprise_task(void *context, int i) {
    const Score *s = context;
    s->nll[i] =
        surprise(s->logits + (size_t)i * (size_t)s->vocab_size, s->vocab_size, s->targets[i]);
}

// How many slots may want logits at once, so that these stay near 16 MiB.
static int logits_batch(const Model *m) {
    int n = (1 << 22) / m->c.vocab_size;
    return n < 1 ? 1 : n > MAX_BATCH ? MAX_BATCH : n;
}

// The sum of the surprises of ids[i + 1] for `scored` <= i < end, where ids[from..i] come before.
static double score_window(const Model *m, Cache *kv, const int *ids, int from, int end,
                           int scored) {
    Slot batch[MAX_BATCH];
    double nll[MAX_BATCH] = {0}, sum = 0;
    prefill(m, kv, 0, ids + from, 0, scored - from);
    for (int i = scored, n; i < end && !interrupted; i += n) {
        for (n = 0; n < logits_batch(m) && i + n < end; n++)
            batch[n] = (Slot){ids[i + n], i + n - from, 0, true};
        Score s = {forward(m, kv, batch, n), m->c.vocab_size, ids + i + 1, nll};
        parallel(surprise_task, &s, n);
        for (int j = 0; j < n; j++) sum += nll[j];
    }
    return sum;
}

// ---- Sessions: a text whose cache lives in a file

// The file is this header (a page), two areas for tokens, and the trunk of the cache, all used in
// place through a shared mapping. What counts is one of two states, written in turn: the one with a
// right hash and the higher number. A state is written after the tokens, keys and values that it
// counts, and before any that an older one counts are overwritten: a program killed at any moment
// leaves a whole session.
typedef struct {
    uint64_t number;        // of the state
    int32_t n_ids, n_done;  // tokens; how many of them the cache holds
    int32_t keep, area;     // tokens that stay when the context is full; which area holds them all
    uint64_t rng;           // state of the random generator
    uint64_t hash;          // of the above
} SessionState;
typedef struct {
    char magic[8];
    uint64_t model;         // the model's hash
    uint64_t chunk_bytes;
    int32_t ctx, keys;
    uint64_t hash;          // of the above
    SessionState states[2];
} SessionHeader;
static const char session_magic[8] = "session4";
enum { PAGE = 4096 };

typedef struct {
    int fd;              // -1: there is none
    const char *path;
    uint8_t *map;
    bool empty;          // it was made here, and holds no text yet: unfinished
    size_t size, reserved;  // of the file; of its bytes, those that the disk has set aside
    SessionState now;    // n_ids: so many tokens of the area are the text's
} Session;

static size_t session_cache_at(int ctx) {
    return (2 * ((size_t)ctx + 1) * sizeof(int) + 2 * PAGE - 1) / PAGE * PAGE;
}
static size_t trunk_bytes(const Cache *kv, int n) {  // of n positions
    return ((size_t)n + CHUNK - 1) / CHUNK * kv->chunk_bytes;
}
static size_t session_size(const Cache *kv, int n) {
    return session_cache_at(kv->ctx) + trunk_bytes(kv, n);
}
static int *session_ids(const void *file, int ctx, int area) {
    return (int *)(uintptr_t)file + PAGE / sizeof(int) + (size_t)area * ((size_t)ctx + 1);
}
static SessionHeader session_header(const Cache *kv) {
    SessionHeader h = {.chunk_bytes = kv->chunk_bytes, .ctx = kv->ctx, .keys = kv->key_dtype};
    memcpy(h.magic, session_magic, sizeof h.magic);
    h.model = kv->m->c.version == 3 ? kv->m->c.content_hash : hash64(kv->m->file, kv->m->file_size);
    h.hash = hash64(&h, offsetof(SessionHeader, hash));
    return h;
}
static void seal_state(SessionState *s) { s->hash = hash64(s, offsetof(SessionState, hash)); }

// The first page of a file with this state.
static const void *first_page(const Cache *kv, SessionState state) {
    static union { SessionHeader h; char page[PAGE]; } first;
    first.h = session_header(kv);
    first.h.states[1] = state;
    seal_state(&first.h.states[1]);
    return &first;
}

// What is wrong with a session file for this cache, or NULL; *state becomes the state that counts.
// With ctx_too, its context must be the cache's.
static const char *check_session(const void *file, size_t size, const Cache *kv, bool ctx_too,
                                 SessionState *state) {
    const SessionHeader *h = file, mine = session_header(kv);
    if (size < sizeof *h || memcmp(file, session_magic, 7)) return "is not a session";
    if (memcmp(h->magic, session_magic, 8)) return "is a session of another version";
    if (h->hash != hash64(h, offsetof(SessionHeader, hash))) return "is damaged: its header";
    if (h->model != mine.model) return "is a session of another model";
    if (h->chunk_bytes != mine.chunk_bytes || h->keys != mine.keys || h->ctx < 1 ||
        h->ctx > 1 << 24)
        return "is a session of another version";
    if (ctx_too && h->ctx != kv->ctx) return "was made with another -c: leave that out";
    *state = (SessionState){0};
    for (int i = 0; i < 2; i++) {
        SessionState s = h->states[i];
        seal_state(&s);
        if (s.hash == h->states[i].hash && s.number > state->number) *state = s;
    }
    if (!state->number || state->n_done < 0 || state->n_ids < state->n_done ||
        state->n_done > h->ctx || state->n_ids > h->ctx + 1 || state->area < 0 || state->area > 1 ||
        state->keep < 0)
        return "is damaged: neither of its states is whole";
    if (state->n_ids && size < session_cache_at(h->ctx) + trunk_bytes(kv, state->n_done))
        return "is truncated";
    const int *ids = session_ids(file, h->ctx, state->area);
    for (int i = 0; i < state->n_ids; i++)
        if (ids[i] < 0 || ids[i] >= kv->m->c.vocab_size) return "is damaged: its tokens";
    return NULL;
}

// Sets disk space aside for n positions, so that a full disk is an error and not a signal.
static void reserve_session(Session *s, const Cache *kv, int n) {
    size_t need = session_size(kv, n < kv->ctx ? n : kv->ctx);
    if (s->fd < 0 || need <= s->reserved) return;
#ifdef __APPLE__
    fstore_t store = {F_ALLOCATEALL, F_PEOFPOSMODE, 0, (off_t)(need - s->reserved), 0};
    int error = fcntl(s->fd, F_PREALLOCATE, &store) ? errno : 0;
#else
    int error;
    do error = posix_fallocate(s->fd, (off_t)s->reserved, (off_t)(need - s->reserved));
    while (error == EINTR);
#endif
    if (error) die("no room for the session %s: %s", s->path, strerror(error));
    s->reserved = need;
}

// A session that another program has open is neither written nor read.
static void refuse_locked(const char *path) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    bool locked = fd >= 0 && !fcntl(fd, F_GETLK, &lock) && lock.l_type != F_UNLCK;
    if (fd >= 0) close(fd);
    if (locked) die("the session %s is in use", path);
}

// Opens or makes a session's file, for this program alone. Returns the context of the session that
// it holds, or 0.
static int open_session(Session *s, const char *path) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat st;
    SessionHeader h;
    bool there = !lstat(path, &st);
    s->path = path;
    s->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0644);
    if (s->fd < 0) die("cannot open the session %s: %s", path, strerror(errno));
    int failed = fcntl(s->fd, F_SETLK, &lock), why = errno;
    if (failed && (why == EACCES || why == EAGAIN)) die("the session %s is in use", path);
    if (fstat(s->fd, &st) || !S_ISREG(st.st_mode)) die("the session %s is not a file", path);
    s->size = (size_t)st.st_size;
    s->empty = !there && !s->size;
    if (s->empty) {
        unfinished[n_unfinished].temporary = (char *)(uintptr_t)path;
        n_unfinished++;
    }
    if (failed) die("cannot lock the session %s: %s", path, strerror(why));
    bool whole = pread(s->fd, &h, sizeof h, 0) == (ssize_t)sizeof h;
    return whole && !memcmp(h.magic, session_magic, 8) && h.ctx > 0 && h.ctx <= 1 << 24 ? h.ctx : 0;
}

// Puts the file in the place of the cache's trunk.
static void map_session(Session *s, Cache *kv) {
    const char *path = s->path;
    if (s->size == 0) {  // its first page makes it a session
        if (pwrite(s->fd, first_page(kv, (SessionState){.number = 1}), PAGE, 0) != PAGE)
            die("cannot write the session %s: %s", path, strerror(errno));
        s->size = PAGE;
    }
    size_t had = s->size;
    void *file = mmap(NULL, had, PROT_READ, MAP_SHARED, s->fd, 0);
    if (file == MAP_FAILED) die("cannot map the session %s: %s", path, strerror(errno));
    const char *wrong = check_session(file, had, kv, true, &s->now);
    munmap(file, had);
    if (wrong) die("%s %s", path, wrong);
    s->size = session_size(kv, kv->ctx);
    s->reserved = session_size(kv, s->now.n_done);
    if (s->reserved > had) s->reserved = had;
    reserve_session(s, kv, s->now.n_done);
    if (had < s->size && ftruncate(s->fd, (off_t)s->size))
        die("cannot make the session %s %zu MiB long: %s", path, s->size >> 20, strerror(errno));
    s->map = mmap(NULL, s->size, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (s->map == MAP_FAILED) die("cannot map the session %s: %s", path, strerror(errno));
    munmap(kv->data, kv->bytes);
    kv->data = s->map + session_cache_at(kv->ctx);
}

static void close_session(Session *s, Cache *kv) {
    if (s->fd < 0) return;
    n_unfinished -= s->empty;
    if (msync(s->map, s->size, MS_SYNC))
        die("cannot write the session %s: %s", s->path, strerror(errno));
    munmap(s->map, s->size);
    close(s->fd);
    kv->data = NULL;
}

// ---- Tools: text that the model writes can be a question to a program

// Runs CMD with the question and a newline as its input; returns its answer, under 4000 bytes,
// without white space at the end. An empty one, after a word on stderr: it failed, or took over 2
// seconds.
static Text ask_tool(const char *command, Text question) {
    static char answer[4001];
    int to[2], from[2], status = 0;
    size_t n = 0;
    pid_t child = 0, done = 0;
    const char *why = question.len >= 4096 ? "is asked too long a question" : NULL;
    if (pipe(to) || pipe(from)) die("cannot make a pipe: %s", strerror(errno));
    // A pipe holds this much, and a newline, without waiting for its reader.
    if (!why && (write(to[1], question.s, question.len) < 0 || write(to[1], "\n", 1) < 0))
        why = "cannot be asked";
    close(to[1]);
    if (!why) child = running_tool = fork();
    if (child < 0) die("cannot start the tool %s: %s", command, strerror(errno));
    if (!why && child == 0) {
        setpgid(0, 0);
        signal(SIGPIPE, SIG_DFL);
        if (dup2(to[0], 0) < 0 || dup2(from[1], 1) < 0) _exit(127);
        close(to[0]), close(from[0]), close(from[1]);
        setenv("BC_LINE_LENGTH", "0", 1);  // bc would break long numbers
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    if (child) setpgid(child, child);
    close(to[0]), close(from[1]);
    double deadline = seconds() + 2;
    for (bool open = true; !why && !done;) {  // until it has closed its output, and ended
        int left = (int)(1000 * (deadline - seconds()));
        struct pollfd ready = {open ? from[0] : -1, POLLIN, 0};
        if (interrupted) why = "is stopped";
        else if (left <= 0) why = "takes too long";
        else if (poll(&ready, 1, open ? left : 1) > 0) {
            ssize_t got = read(from[0], answer + n, sizeof answer - 1 - n);
            if (got < 0 && errno == EINTR) continue;
            open = got > 0;
            n += got > 0 ? (size_t)got : 0;
            if (n == sizeof answer - 1) why = "says too much";
        } else if (!open) done = waitpid(child, &status, WNOHANG);
    }
    close(from[0]);
    // It may have ended and left a child behind that keeps the pipe open.
    if (why && child && n && n < sizeof answer - 1) done = waitpid(child, &status, WNOHANG);
    if (why && done > 0 && !status) why = NULL;
    if (child) kill(-child, SIGKILL);
    running_tool = 0;
    if (child && !done) while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    while (n && (uint8_t)answer[n - 1] <= ' ') n--;
    if (!why) why = status ? "fails" : n ? NULL : "prints nothing";
    if (why && !interrupted)
        fprintf(stderr, "run: the tool %s %s: the model goes on alone\n", command, why);
    return (Text){answer, why ? 0 : n};
}

// Reads an arithmetic expression (numbers, + - * / % ^, parentheses) and returns its end, or NULL.
static const char *read_expression(const char *s, int *n_operators) {
    static const char digits[] = "0123456789";
    for (;; s++) {
        s += strspn(s, " -");
        if (*s == '(') {
            s = read_expression(s + 1, n_operators);
            if (!s || *s++ != ')') return NULL;
        } else {
            if (!strspn(s, digits)) return NULL;
            s += strspn(s, digits);
            if (*s == '.' && strspn(s + 1, digits)) s += 1 + strspn(s + 1, digits);
        }
        s += strspn(s, " ");
        if (!*s || !strchr("+-*/%^", *s)) return s;
        ++*n_operators;
    }
}

// Whether the character at i is a minus that begins a line, with a space behind it.
static bool is_bullet(Text text, size_t i) {
    return text.s[i] == '-' && text.s[i + 1] == ' ' && (i == 0 || text.s[i - 1] == '\n');
}

// The question that a text ends in, and what comes before and after the answer to it. In the text's
// last line an arithmetic expression and "="; or a <tool_call> with JSON. An empty one: none.
static Text find_question(Text text, const char **before, const char **after) {
    static const char call[] = "<tool_call>", end[] = "</tool_call>";
    size_t n = text.len, n_end = sizeof end - 1;
    *before = *after = "";
    if (n >= n_end && !memcmp(text.s + n - n_end, end, n_end)) {
        size_t last = n -= n_end;
        while (n && memcmp(text.s + n, call, sizeof call - 1)) n--;
        if (memcmp(text.s + n, call, sizeof call - 1)) return (Text){"", 0};
        *before = "\n<tool_response>\n", *after = "\n</tool_response>\n";
        n += sizeof call - 1;
        return (Text){text.s + n, last - n};
    }
    while (n && text.s[n - 1] == ' ') n--;
    if (!n || text.s[n - 1] != '=') return (Text){"", 0};
    size_t equals = n - 1, first = equals;
    if (n == text.len && equals && text.s[equals - 1] == ' ') *before = " ";
    while (first && equals - first < 200 && text.s[first - 1] &&
           strchr("0123456789.+-*/%^() ", text.s[first - 1])) first--;
    if (equals - first == 200) return (Text){"", 0};
    for (; first < equals; first++) {  // the longest expression that is not part of something else
        int n_operators = 0;
        size_t at = first;
        while (at && text.s[at - 1] == ' ') at--;
        int c = at ? text.s[at - 1] : '\n';
        bool word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        bool inside = (word && at == first) || (c && strchr(".,(+-*/%^:=_", c));
        if (c == '-' && is_bullet(text, at - 1)) inside = false;
        if (text.s[first] == ' ' || inside || is_bullet(text, first)) continue;
        const char *stop = read_expression(text.s + first, &n_operators);
        if (stop != text.s + equals || !n_operators) continue;
        *after = "\n";  // or the model might add digits
        return (Text){text.s + first, equals - first};
    }
    return (Text){"", 0};
}

// ---- Decoders: texts that grow, token by token

enum { MAX_DRAFT = 15, MAX_SAMPLES = 256 };

// A text in progress: its tokens, its place in the cache, its sampler.
typedef struct {
    Ids ids;                // tokens of its context
    int done;               // the cache holds the keys and values of so many
    int seq;                // as this sequence
    int keep;               // tokens at the beginning that stay when the context is full
    Sampler s;
    const float *logits;    // to draw the next token from; NULL: not computed
    long long budget;       // tokens that it may still draw; 0 after one that ends the text
    int draft[MAX_DRAFT], n_draft, n_right;  // guesses at the next tokens; those drawn since, too
    int drawn;              // the last token that was drawn
    int n_new;              // tokens that it drew
    double logprob;         // the sum of their log-probabilities (with -k)
    uint64_t receipt, words;
    Output *out;            // where the text goes
    Output own;             // in memory: with -k it goes there
    Output text;            // in memory, too: what is searched for questions to tools
} Decoder;

// Speculation: what guesses, and how it pays. How sure a guess is tells its lead, how far its logit
// is above the best other one: there are five classes of leads, and class 0 is all guesses.
enum { LEADS = 6, FIRST_STEPS = 3 };
typedef struct {
    const Model *m;         // a small model; NULL: the text so far is looked up
    Cache kv;
    int done;               // tokens that its cache holds
    int lead[MAX_DRAFT];    // the guesses' classes
    double right[LEADS], of[LEADS];  // moving sums of each class: right ones, of so many
    double plain, more;     // seconds of a step without guesses; of each guess on top of that
    int plain_steps;        // without guesses; the first ones are slower, and the fastest counts
    double token;           // seconds of a small model's token
    double catching_up;     // seconds in which the small model read what it did not know yet
    double total, lost;     // seconds of all steps; what guesses have cost on balance
    long long proposed, accepted, steps;
} Draft;

typedef struct {
    const Options *o;
    const Model *m;
    const Tokenizer *t;
    int ctx;
    Output *out;
    Cache kv;
    Session session;
    Draft draft;
    float *p;               // (threads, vocab_size) scratch of the samplers
    Candidate *candidates;  // (threads, vocab_size)
    Decoder *all;           // that run
    bool shifted;           // the context was full
    int n_drawn;            // tokens that all decoders drew
    bool chatting;
    Ids turns;              // where the turns of a chat start that can be taken back
    double rate;            // tokens per second of its last turn
    double first_logits;    // when the prompt was computed
} Machine;

// Makes the first n_ids tokens the session's state.
static void save_decoder(Machine *w, const Decoder *d, int n_ids) {
    Session *s = &w->session;
    if (s->fd < 0 || d->seq != 0) return;
    if (n_ids > w->ctx + 1) n_ids = d->done;  // what there is no room for is not part of it yet
    int *area = session_ids(s->map, w->ctx, s->now.area);
    for (int i = s->now.n_ids; i < n_ids; i++) area[i] = d->ids.ids[i];
    s->now = (SessionState){s->now.number + 1, n_ids, d->done, d->keep, s->now.area, d->s.rng, 0};
    seal_state(&s->now);
    atomic_signal_fence(memory_order_seq_cst);  // the compiler must keep the order
    ((SessionHeader *)(void *)s->map)->states[s->now.number & 1] = s->now;
    atomic_signal_fence(memory_order_seq_cst);
    if (n_ids) n_unfinished -= s->empty, s->empty = false;
}

// Puts n other tokens in the place of those from a position on. A session writes them into its
// other area: until they are there, it is the text as it was.
static void rewrite(Machine *w, Decoder *d, int from, const int *ids, int n) {
    if (d->seq == 0 && from < (int)d->ids.n) w->session.now.area ^= 1, w->session.now.n_ids = 0;
    if (d->done > from) d->done = from;
    if (w->draft.done > from) w->draft.done = from;
    if (w->kv.from[d->seq] > from) w->kv.from[d->seq] = from;
    d->ids.n = (size_t)from;
    for (int i = 0; i < n; i++) push(&d->ids, ids[i]);
    save_decoder(w, d, from + n);
}

// A full context: the beginning and the newest half stay, what is between them is dropped. The kept
// tokens have new positions and new neighbours: all but the beginning are computed again.
static void make_room(Machine *w, Decoder *d) {
    int half = w->ctx > 1 ? w->ctx / 2 : 1, keep = w->ctx - half - 1;
    if ((int)d->ids.n <= w->ctx) return;
    if (keep > d->keep) keep = d->keep;
    if (keep < 0) keep = 0;
    rewrite(w, d, keep, d->ids.ids + d->ids.n - (size_t)half, half);
    if (d->seq == 0) w->turns.n = 0;
    if (!w->shifted && !w->o->quiet)
        fprintf(stderr, "\n(the context of %d tokens is full: from here on the beginning and the "
                        "newest half stay)\n", w->ctx);
    w->shifted = true;
}

// Computes a text's tokens up to `to` without logits.
static void fill(Machine *w, Decoder *d, int to) {
    Slot batch[MAX_BATCH];
    while (d->done < to && !interrupted) {
        int n = to - d->done < MAX_BATCH ? to - d->done : MAX_BATCH;
        for (int i = 0; i < n; i++)
            batch[i] = (Slot){d->ids.ids[d->done + i], d->done + i, d->seq, false};
        if (d->seq == 0) reserve_session(&w->session, &w->kv, d->done + n);
        forward(w->m, &w->kv, batch, n);
        d->done += n;
        // What is computed again is saved as it comes, a new prompt when all of it is there.
        if (d->done <= w->session.now.n_ids) save_decoder(w, d, w->session.now.n_ids);
    }
}

// Lookup decoding: where the last tokens have occurred before, what followed then is the guess.
static int look_back(const Decoder *d, int *guess, int most) {
    const int *ids = d->ids.ids;
    int n = (int)d->ids.n, best = 0, at = 0;
    for (int end = n - 1; end >= 2 && best < 8; end--) {
        int same = 0;
        while (same < 8 && same < end && ids[end - 1 - same] == ids[n - 1 - same]) same++;
        if (same > best) best = same, at = end;
    }
    if (best < 2) return 0;
    for (int i = 0; i < most; i++) guess[i] = at + i < n ? ids[at + i] : guess[at + i - n];
    return most;
}

static double hit(const Draft *f, int lead) { return f->right[lead] / f->of[lead]; }

static int lead_of(const float *logits, int n, int token) {
    float other = -INFINITY;
    if (token > 0) other = largest(logits, 0, token);
    if (token < n - 1) other = fmaxf(other, largest(logits, token + 1, n));
    float lead = logits[token] - other;
    return 1 + (lead >= -2) + (lead >= 0) + (lead >= 0.15f) + (lead >= 0.5f);
}

// Guesses up to `most` tokens with the small model: it draws with the random numbers that the large
// one will draw with, so that they part only where the models do. Stops where one more guess will
// come to less than `rate` tokens a second.
static int small_model_guesses(Machine *w, Decoder *d, int most, double rate) {
    Draft *f = &w->draft;
    Sampler s = d->s;
    size_t n = d->ids.n;
    int made = 0;
    if (f->done >= (int)n) f->done = (int)n - 1;
    double reach = 1;  // the probability that all guesses so far are right
    if ((int)n + most > f->kv.ctx) return 0;
    double start = seconds();
    prefill(f->m, &f->kv, 0, d->ids.ids, f->done, (int)n - 2);
    f->catching_up = seconds() - start;
    if (f->done < (int)n - 2 && !interrupted) f->done = (int)n - 2;
    // Two tokens are new after guesses that were all right, else one.
    while (made < most && (!made || reach * hit(f, 0) > rate * f->more)) {
        const float *logits = prefill(f->m, &f->kv, 0, d->ids.ids, f->done, (int)d->ids.n);
        if (interrupted) break;
        f->done = (int)d->ids.n;
        int next = sample(&s, logits, d->ids.ids, (int)d->ids.n);
        f->lead[made] = lead_of(logits, f->m->c.vocab_size, next);
        reach *= hit(f, f->lead[made]);
        d->draft[made++] = next;
        push(&d->ids, next);
        if (is_stop(w->t, next)) break;
    }
    d->ids.n = n;
    return made;
}

// Speculative decoding (arXiv:2211.17192): a batch checks several guessed tokens at nearly the cost
// of one. How many to guess: with the probability h that one is right, n guesses give
// 1 + h + ... + h^n tokens in the time plain + n * more; the best n may be 0. (If it is not, a
// small model guesses as long as it is sure.)
static void propose(Machine *w, Decoder *d) {
    Draft *f = &w->draft;
    int most = 0, room = w->ctx - (int)d->ids.n, limit = f->m ? TILE - 1 : MAX_DRAFT;
    double tokens = 1, power = 1, best = 1.03 / f->plain;
    bool again = d->n_draft > 0;
    d->n_draft = 0;
    if (!w->o->draft || f->plain_steps < FIRST_STEPS) return;
    if (f->more == 0 && f->m)  // as memory goes
        f->token = f->plain * (double)f->m->file_size / (double)w->m->file_size;
    if (f->more == 0) f->more = f->token + 0.3 * f->plain;
    for (int n = 1; n <= limit; n++) {
        tokens += power *= hit(f, 0);
        double speed = tokens / (f->plain + n * f->more);
        if (speed > best) best = speed, most = n;
    }
    if (f->m && most) most = limit;
    // A small model must first catch up with the text, and the tokens to come must win that back.
    // Guesses may lose 2% of the time on balance, and at first the time of a token: so many are
    // made at most, and so often they are tried where they do not seem to pay.
    double behind = 0.5 * f->token * ((int)d->ids.n - f->done);
    double ahead = (double)(d->budget < 256 ? d->budget : 256);
    double allowed = fmax(f->plain, 0.02 * (f->total + ahead * f->plain)) - f->lost;
    if (allowed < 0) allowed = 0;
    if (behind > ahead * (f->plain - 1 / best)) most = 0;
    if (!most && !again && behind < allowed) most = 2;
    if (most * f->more > allowed) most = (int)(allowed / f->more);
    if (room > d->budget - 1) room = (int)d->budget - 1;
    if (most > room) most = room;
    if (most > 0)
        d->n_draft = f->m ? small_model_guesses(w, d, most, best) : look_back(d, d->draft, most);
    f->proposed += d->n_draft;
}

// Learns from a step that took so many seconds, in which `accepted` guesses were right. One that
// computed more than the guesses and the last token is not usual.
static void measure(Draft *f, int proposed, int accepted, double time, bool usual) {
    f->steps++;
    f->accepted += accepted;
    f->total += time;
    if (!usual) return;
    // (A step that something else held up is not charged to the guesses.)
    double most = f->catching_up + 2 * f->plain * proposed;
    if (proposed) f->lost += fmin(time - f->plain * (1 + accepted), most);
    if (f->lost < 0) f->lost = 0;
    time -= f->catching_up;
    if (proposed == 0) {
        bool fast = f->plain_steps++ < FIRST_STEPS && (f->plain == 0 || time < f->plain);
        if (fast) f->plain = time;
        else f->plain += 0.2 * (fmin(time, 2 * f->plain) - f->plain);
        return;
    }
    double more = (time - f->plain) / proposed, least = 0.02 * f->plain;
    more = more < least ? least : more > 2 * f->plain ? 2 * f->plain : more;
    f->more += (more < f->more ? 0.5 : 0.1) * (more - f->more);  // slow steps are often chance
    for (int i = 0; i < proposed && i <= accepted; i++)
        for (int lead = 0; lead <= f->lead[i]; lead += f->lead[i] ? f->lead[i] : 1) {
            f->right[lead] = 0.95 * f->right[lead] + (i < accepted);
            f->of[lead] = 0.95 * f->of[lead] + 1;
        }
}

static void print_receipt(const Decoder *d) {
    fprintf(stderr, "receipt: %016llx\n", (unsigned long long)mix64(d->receipt + d->words));
}

// Computes all but the last token, so that text and cache can be kept.
static void settle(Machine *w, Decoder *d) {
    make_room(w, d);
    if (d->ids.n) fill(w, d, (int)d->ids.n - 1);
}

// Computes the logits of all decoders that still draw, in one batch. False if there are none, or
// after Ctrl-C.
static bool compute(Machine *w, Decoder *d, int n) {
    Slot batch[MAX_SAMPLES + MAX_DRAFT];
    int n_slots = 0;
    bool live = false;
    for (int i = 0; i < n && !interrupted; i++) {
        live |= d[i].budget > 0;
        if (d[i].budget <= 0 || d[i].logits) continue;
        settle(w, &d[i]);
        if (interrupted) break;
        int last = (int)d[i].ids.n - 1;
        d[i].done = last;
        d[i].n_right = 0;
        if (n == 1) propose(w, d);
        if (d[i].seq == 0) reserve_session(&w->session, &w->kv, last + 1 + d[i].n_draft);
        batch[n_slots++] = (Slot){d[i].ids.ids[last], last, d[i].seq, true};
        for (int j = 0; j < d[i].n_draft; j++)
            batch[n_slots++] = (Slot){d[i].draft[j], last + 1 + j, d[i].seq, true};
    }
    if (interrupted || !live) return false;
    const float *logits = n_slots ? forward(w->m, &w->kv, batch, n_slots) : NULL;
    for (int i = 0; i < n; i++) {
        if (d[i].budget <= 0 || d[i].logits) continue;
        d[i].done = (int)d[i].ids.n;
        d[i].logits = logits;
        logits += (size_t)w->m->c.vocab_size * (size_t)(1 + d[i].n_draft);
    }
    if (!w->first_logits) w->first_logits = seconds();
    save_decoder(w, d, d->done);
    return true;
}

// Draws the next token of a decoder.
static void draw_task(void *context, int i) {
    Machine *w = context;
    Decoder *d = &w->all[i];
    if (!d->logits) return;
    size_t vocab = (size_t)w->m->c.vocab_size;
    d->s.p = w->p + (size_t)this_thread * vocab;
    d->s.candidates = w->candidates + (size_t)this_thread * vocab;
    d->drawn = sample(&d->s, d->logits, d->ids.ids, (int)d->ids.n);
    if (w->o->samples) d->logprob -= surprise(d->logits, (int)vocab, d->drawn);
    if (w->o->receipt) {
        d->receipt += hash_words(d->logits, vocab * sizeof(float), d->words);
        d->words += (vocab + 1) / 2;
    }
}

// If the text ends in a question to the tool, asks it and appends its answer. What it answers is
// text: special tokens are not recognised in it.
static bool use_tool(Machine *w, Decoder *d) {
    const char *before, *after;
    Text question = find_question((Text){d->text.memory, d->text.n}, &before, &after);
    if (!w->o->tool || !question.len) return false;
    Text answer = ask_tool(w->o->tool, question);
    if (!answer.len) return false;
    bool turn = *before == '\n' && w->chatting;  // the answer to a <tool_call>
    Prompt p = {0};
    size_t from = d->ids.n;
    if (turn) append(&p, w->t->chat[ASSISTANT_AFTER], false);
    if (turn) append(&p, w->t->chat[LATER_BEFORE], false);
    Text said[] = {{before, strlen(before)}, answer, {after, strlen(after)}};
    for (int i = 0; i < 3; i++) {
        append(&p, said[i], i == 1);
        write_reply(d->out, said[i]);
        write_text(&d->text, said[i]);
    }
    if (turn) append(&p, w->t->chat[LATER_AFTER], false);
    encode(w->t, (Text){p.s, p.n}, p.typed, false, &d->ids);
    free(p.s);
    free(p.typed);
    return d->ids.n > from;
}

// Appends the token that was drawn. If it is the drafted one, the logits behind it are there.
static void accept(Machine *w, Decoder *d) {
    int next = d->drawn, last = d->ids.ids[d->ids.n - 1];
    const float *behind = d->logits + w->m->c.vocab_size;
    bool agreed = d->n_right < d->n_draft && next == d->draft[d->n_right], asked = false;
    w->n_drawn++;
    d->n_new++;
    d->budget--;
    d->logits = NULL;
    if (is_stop(w->t, next)) {
        d->budget = 0;
        return;
    }
    push(&d->ids, next);
    write_token(d->out, w->t, last, next);
    if (w->o->tool) {
        write_text(&d->text, decode(w->t, last, next));
        asked = use_tool(w, d);
    }
    d->n_right += agreed;
    d->done += agreed;
    if (agreed && !asked && d->budget > 0) d->logits = behind;
}

// Runs n decoders, the first of which may be sequence 0, until all have ended: a step computes the
// logits of all in one batch, and each draws one token, or as many as were guessed right.
static void run_decoders(Machine *w, Decoder *d, int n) {
    w->all = d;
    for (;;) {
        double start = seconds();
        int before = d->done;
        w->draft.catching_up = 0;
        if (!compute(w, d, n)) return;
        bool usual = d->done - before == 0 || d->done - before == 1;
        for (bool drawing = true; drawing;) {
            parallel(draw_task, w, n);
            drawing = false;
            for (int i = 0; i < n; i++) {
                if (d[i].logits) accept(w, &d[i]);
                drawing |= d[i].logits != NULL;
            }
        }
        if (w->o->draft && n == 1)
            measure(&w->draft, d->n_draft, d->n_right, seconds() - start, usual);
        if (w->draft.done > d->done) w->draft.done = d->done;
    }
}

// Sets up a machine and its first decoder, sequence 0: the session's text, or none yet.
static void open_machine(Machine *w, Decoder *d, const Options *o, const Model *m,
                         const Tokenizer *t, Output *out) {
    *w = (Machine){.o = o, .m = m, .t = t, .ctx = context_of(o, m), .out = out};
    *d = (Decoder){.s = new_sampler(o, m, t), .out = o->samples > 1 ? &d->own : out,
                   .own = {.fd = -1, .terminal = out->terminal}, .text = {.fd = -1}};
    w->session.fd = -1;
    int theirs = o->session ? open_session(&w->session, o->session) : 0;
    if (theirs && !o->context) w->ctx = theirs < m->c.seq_len ? theirs : m->c.seq_len;
    new_cache(&w->kv, m, w->ctx, 0, 0);
    size_t vocab = (size_t)m->c.vocab_size * (size_t)o->threads;
    d->s.p = w->p = resize(NULL, vocab, sizeof *w->p);
    d->s.candidates = w->candidates = resize(NULL, vocab, sizeof *w->candidates);
    if (o->session) {
        map_session(&w->session, &w->kv);
        const SessionState *s = &w->session.now;
        const int *ids = session_ids(w->session.map, w->ctx, s->area);
        for (int i = 0; i < s->n_ids; i++) push(&d->ids, ids[i]);
        d->done = s->n_done;
        d->keep = s->keep;
        if (!o->seed && s->rng) d->s.rng = s->rng;
    }
    if (!o->draft) return;
    static Model small;
    for (int i = 0; i < LEADS; i++) w->draft.right[i] = 1.6, w->draft.of[i] = 2;
    if (!strcmp(o->draft, "lookup")) return;
    load_model(&small, o->draft);
    if (small.c.vocab_size != m->c.vocab_size || small.c.tokenizer_hash != m->c.tokenizer_hash)
        die("%s cannot draft for %s: it has another tokenizer", o->draft, m->path);
    w->draft.m = &small;
    new_cache(&w->draft.kv, &small, w->ctx < small.c.seq_len ? w->ctx : small.c.seq_len, 0, 0);
}

static void free_decoder(Decoder *d) {
    free(d->ids.ids);
    free(d->own.memory);
    free(d->text.memory);
}

static void close_machine(Machine *w, Decoder *d) {
    if (w->session.fd >= 0 && !interrupted) settle(w, d);
    // A token that was drawn last is part of the session; a prompt that was interrupted is not.
    if ((int)d->ids.n <= d->done + 1) save_decoder(w, d, (int)d->ids.n);
    close_session(&w->session, &w->kv);
    free(w->p);
    free(w->candidates);
    free_cache(&w->kv);
    free(w->turns.ids);
    if (w->draft.m) free_cache(&w->draft.kv), free_model((Model *)(uintptr_t)w->draft.m);
    free_decoder(d);
}

static void tell_seed(const Machine *w, const Decoder *d) {
    if (!w->o->quiet && !w->o->seed && d->s.temperature > 0)
        fprintf(stderr, "seed: %llu\n", (unsigned long long)d->s.rng);
}

static Output copy_memory(const Output *from) {
    Output copy = *from;
    copy.memory = NULL;
    copy.n = copy.capacity = 0;
    write_output(&copy, from->memory, from->n);
    return copy;
}

// Makes a decoder for branch i + 1 of the trunk's cache, with all that the trunk has.
static void branch(Machine *w, const Decoder *trunk, Decoder *d, int i) {
    *d = *trunk;
    d->seq = i + 1;
    d->s.rng += (uint64_t)i * 0x9E3779B97F4A7C15u;
    d->s.rng += d->s.rng == 0;  // which would stay 0
    w->kv.from[d->seq] = (int)trunk->ids.n;
    d->ids = (Ids){0};
    for (size_t j = 0; j < trunk->ids.n; j++) push(&d->ids, trunk->ids.ids[j]);
    d->out = &d->own;
    d->own = copy_memory(&trunk->own);
    d->text = copy_memory(&trunk->text);
}

// Continues a text k times at once, in branches of its cache, which holds the common beginning
// once; sample i has the seed + i * 0x9E3779B97F4A7C15. Prints all samples, or with -b the best
// one, whose tokens become the trunk's. The best is the likeliest by the mean log-probability of
// its tokens: likelihood stands in for a reward model that ranks answers.
static void run_samples(Machine *w, Decoder *trunk) {
    int k = (int)w->o->samples, best = 0;
    Decoder *d = resize(NULL, (size_t)k, sizeof *d);
    compute(w, trunk, 1);
    bool fits = (int)trunk->ids.n + trunk->budget <= w->ctx && !w->o->tool;
    add_branches(&w->kv, k, fits ? (int)trunk->budget : w->ctx);
    for (int i = 0; i < k; i++) branch(w, trunk, &d[i], i);
    trunk->logits = NULL;
    run_decoders(w, d, k);
    for (int i = 1; i < k; i++)
        if (d[i].logprob * d[best].n_new > d[best].logprob * d[i].n_new) best = i;
    for (int i = 0; i < k; i++) {
        if (!w->o->quiet)
            fprintf(stderr, "sample %d of %d: seed %llu, %d tokens, mean log-probability %.4f%s\n",
                    i + 1, k,
                    (unsigned long long)(trunk->s.rng + (uint64_t)i * 0x9E3779B97F4A7C15u),
                    d[i].n_new, d[i].logprob / (d[i].n_new + !d[i].n_new),
                    i == best ? ", the best" : "");
        if (w->o->receipt) print_receipt(&d[i]);
        if (w->o->best && i != best) continue;
        end_text(d[i].out);
        write_output(w->out, d[i].own.memory, d[i].own.n);
    }
    trunk->n_new = d[best].n_new;
    if (w->o->best && trunk->done == (int)trunk->ids.n) {  // else the prompt was interrupted
        int same = w->kv.from[best + 1];  // less than the trunk has if the context was full
        trunk->s.rng = d[best].s.rng;
        if (same < (int)trunk->ids.n) w->turns.n = 0;
        rewrite(w, trunk, same, d[best].ids.ids + same, (int)d[best].ids.n - same);
    }
    for (int i = 0; i < k; i++) free_decoder(&d[i]);
    free(d);
    free(trunk->own.memory);
    trunk->own = (Output){.fd = -1, .terminal = w->out->terminal};
}

// Lets the model go on with the text, until it ends or its budget is used up.
static void continue_text(Machine *w, Decoder *d) {
    if (w->o->samples > 1) run_samples(w, d);
    else {
        run_decoders(w, d, 1);
        end_text(d->out);
    }
}

static void print_statistics(const Machine *w, int n_prompt, double start) {
    double done = seconds(), prefilled = w->first_logits;
    const Draft *f = &w->draft;
    if (w->o->quiet || !prefilled) return;
    fprintf(stderr, "prompt: %d tokens, %.1f tok/s; generated: %d tokens, %.1f tok/s\n", n_prompt,
            n_prompt / (prefilled - start), w->n_drawn,
            w->n_drawn > 1 ? (w->n_drawn - 1) / (done - prefilled) : 0.0);
    if (w->o->draft)
        fprintf(stderr,
                "speculation: %lld tokens proposed, %lld accepted, %.2f tokens per forward\n",
                f->proposed, f->accepted,
                f->steps ? (double)(f->accepted + f->steps) / (double)f->steps : 1.0);
}

// ---- generate: continue a text

// Appends the tokens of a text and returns how many there are. One that has certainly more than the
// context is not cut into tokens, which takes long: this returns how many it has at least.
static size_t encode_if_short(const Tokenizer *t, Text text, const char *typed, bool text_start,
                              int ctx, Ids *ids) {
    size_t before = ids->n, least = least_tokens(t, text.len);
    if (least > (size_t)ctx) return least;
    encode(t, text, typed, text_start, ids);
    return ids->n - before;
}

// Appends the prompt's tokens and returns how many may be drawn after them.
static long long start_text(const Options *o, const Model *m, const Tokenizer *t, int ctx,
                            Text prompt, Ids *ids) {
    size_t before = ids->n, n = encode_if_short(t, prompt, NULL, before == 0, ctx, ids);
    if (n > (size_t)ctx)
        die("the prompt has %s%zu tokens, the context of %s only %d: shorten it, or see -c",
            ids->n == before ? "over " : "", n, m->path, ctx);
    if (!ids->n && (t->h.bos >= 0 || t->h.eos >= 0)) push(ids, t->h.bos >= 0 ? t->h.bos : t->h.eos);
    if (!ids->n) die("the prompt is empty, and %s has neither BOS nor EOS to start from", m->path);
    if (!t->llama2c) return o->steps ? o->steps : ctx - (long long)ids->n + 1;
    // llama2.c counts positions, the prompt's included, and stays within the context.
    // (A session's last token is no such position yet: it was drawn, and not computed.)
    size_t end = (before ? before - 1 : 0) + (size_t)(o->steps ? o->steps : ctx);
    if (end > (size_t)ctx) end = (size_t)ctx;
    if (ids->n > end + 1) ids->n = end + 1;
    return (long long)(end + 1 - ids->n);
}

static void generate(const Options *o, const Model *m, const Tokenizer *t, Text prompt,
                     Output *out) {
    double start = seconds();
    Machine w;
    Decoder d;
    open_machine(&w, &d, o, m, t, out);
    size_t before = d.ids.n;
    d.budget = start_text(o, m, t, w.ctx, prompt, &d.ids);
    if (before == 0) d.keep = d.ids.n < 4 ? (int)d.ids.n : 4;
    if (t->llama2c)
        for (size_t i = before ? before : 1; i < d.ids.n; i++)
            write_token(d.out, t, d.ids.ids[i - 1], d.ids.ids[i]);
    else write_text(d.out, prompt);
    int n_prompt = (int)(d.ids.n - before);
    // The session's text may end within a thought or a question to the tool.
    for (size_t i = 0; i < before && (o->tool || !t->llama2c); i++)
        write_text(&d.text, decode(t, i ? d.ids.ids[i - 1] : -1, d.ids.ids[i]));
    write_text(&d.text, prompt);
    start_thoughts(d.out, o, !t->llama2c, (Text){d.text.memory, d.text.n});
    if (prompt.len) use_tool(&w, &d);
    if (o->samples < 2) tell_seed(&w, &d);
    if (d.budget <= 0 && !t->llama2c) {  // up to the end of a context that is full already
        make_room(&w, &d);
        d.budget = w.ctx - (long long)d.ids.n + 1;
    }
    continue_text(&w, &d);
    if (o->receipt && o->samples < 2) print_receipt(&d);
    print_statistics(&w, n_prompt, start);
    close_machine(&w, &d);
}

// ---- ensembles: several models answer, and judge each other's answers

// Bits per byte of an answer to a prompt.
static double answer_bits(const Model *m, const Tokenizer *t, Text prompt, Text answer) {
    Ids ids = {0};
    encode(t, prompt, NULL, true, &ids);
    if (!ids.n) push(&ids, t->h.bos >= 0 ? t->h.bos : t->h.eos >= 0 ? t->h.eos : 0);
    int n_prompt = (int)ids.n;
    encode(t, answer, NULL, false, &ids);
    double sum = INFINITY;
    if (ids.n <= (size_t)m->c.seq_len + 1 && ids.n > (size_t)n_prompt) {
        Cache kv;
        new_cache(&kv, m, (int)ids.n, 0, 0);
        sum = score_window(m, &kv, ids.ids, 0, (int)ids.n - 1, n_prompt - 1);
        free_cache(&kv);
    }
    free(ids.ids);
    return sum / 0.69314718055994531 / (double)answer.len;
}

// Loads another model. False, after a word on stderr, if it cannot answer the prompt.
static bool takes_part(const Options *o, const char *path, Text prompt, Model *m, Tokenizer *t) {
    static Ids ids;  // static, and so known after a longjmp
    jmp_buf failed;
    if (!setjmp(failed)) {
        recovery = &failed;
        load_model(m, path);
        find_tokenizer(t, NULL, m);
        start_text(o, m, t, context_of(o, m), prompt, &ids);
        recovery = NULL;
    }
    bool fails = recovery != NULL;
    recovery = NULL;
    free(ids.ids);
    ids = (Ids){0};
    if (!fails) return true;
    fprintf(stderr, "run: %s does not take part\n", path);
    if (t->file) free_tokenizer(t);
    if (m->file) free_model(m);
    return false;
}

// All models answer the prompt; each scores each answer in bits per byte, a measure that does not
// depend on the tokenizer; the answer with the lowest average is printed.
static void ensemble(const Options *o, const Model *m, const Tokenizer *t, Text prompt,
                     Output *out) {
    static Model models[1 + MAX_OTHERS];
    static Tokenizer tokenizers[1 + MAX_OTHERS];
    Output answers[1 + MAX_OTHERS] = {{0}};
    int n = 1, best = 0;
    double lowest = INFINITY;
    models[0] = *m, tokenizers[0] = *t;
    for (int i = 0; i < o->n_others; i++)
        n += takes_part(o, o->others[i], prompt, &models[n], &tokenizers[n]);
    for (int i = 0; i < n; i++)
        if (same_file(o->output, tokenizers[i].path))
            die("-o %s would overwrite a model's tokenizer", o->output);
    for (int i = 0; i < n && !interrupted; i++) {
        answers[i].fd = -1;
        if (!o->quiet) fprintf(stderr, "%s%s answers\n", i ? "\n" : "", models[i].path);
        generate(o, &models[i], &tokenizers[i], prompt, &answers[i]);
    }
    for (int i = 0; i < n && !interrupted; i++) {
        const Output *a = &answers[i];
        Text answer = {a->memory + a->start, a->n - a->start - 1};
        double sum = 0, bits;
        if (!o->quiet) fprintf(stderr, "%s%s's answer:", i ? "" : "\n", models[i].path);
        for (int j = 0; j < n; j++) {
            sum += bits = answer_bits(&models[j], &tokenizers[j], prompt, answer);
            if (!o->quiet) fprintf(stderr, " %.4f", bits);
        }
        if (!o->quiet) fprintf(stderr, " bits per byte, mean %.4f\n", sum / n);
        if (sum < lowest) lowest = sum, best = i;
    }
    if (!interrupted && !o->quiet && n > 1)
        fprintf(stderr, "the best answer is %s's\n", models[best].path);
    if (!interrupted) write_text(out, (Text){answers[best].memory, answers[best].n});
    for (int i = 0; i < n; i++) {
        free(answers[i].memory);
        if (i) free_tokenizer(&tokenizers[i]), free_model(&models[i]);
    }
}

// ---- chat: a conversation, whose keys and values stay in the cache from turn to turn

// Writes the conversation into a file that -S and /load open.
static void save_conversation(Machine *w, Decoder *d, const char *path) {
    static const char zeros[PAGE];
    struct stat st;
    refuse_locked(path);
    if (!stat(path, &st) && st.st_size) {
        char magic[sizeof session_magic] = "";
        FILE *old = fopen(path, "rb");
        size_t got = old ? fread(magic, 1, sizeof magic, old) : 0;
        if (old) fclose(old);
        if (got < sizeof magic || memcmp(magic, session_magic, 7))
            die("%s is not a session: it is left as it is", path);
    }
    settle(w, d);
    size_t cache_at = session_cache_at(w->ctx), at = PAGE + d->ids.n * sizeof(int), n;
    SessionState state = {1, (int)d->ids.n, d->done, d->keep, 0, d->s.rng, 0};
    Output file = open_output(path);
    write_output(&file, first_page(&w->kv, state), PAGE);
    write_output(&file, d->ids.ids, d->ids.n * sizeof(int));
    for (; at < cache_at; at += n) {
        n = cache_at - at < PAGE ? cache_at - at : PAGE;
        write_output(&file, zeros, n);
    }
    write_output(&file, w->kv.data, trunk_bytes(&w->kv, d->done));
    close_output(&file);
}

// Takes the conversation of a file in the place of this one.
static void load_conversation(Machine *w, Decoder *d, const char *path) {
    size_t size;
    SessionState s;
    refuse_locked(path);
    const uint8_t *file = map_file(path, &size);
    const char *wrong = check_session(file, size, &w->kv, false, &s);
    if (!wrong && s.n_ids > w->ctx + 1) wrong = "is longer than this chat's context";
    if (!wrong) {
        if (s.n_done > w->ctx) s.n_done = w->ctx;
        reserve_session(&w->session, &w->kv, s.n_done);
        int ctx = ((const SessionHeader *)(const void *)file)->ctx;
        rewrite(w, d, 0, session_ids(file, ctx, s.area), s.n_ids);
        memcpy(w->kv.data, file + session_cache_at(ctx), trunk_bytes(&w->kv, s.n_done));
        d->done = s.n_done;
        d->keep = s.keep;
        w->turns.n = 0;
        save_decoder(w, d, s.n_ids);
    }
    munmap((void *)(uintptr_t)file, size);
    if (wrong) die("%s %s", path, wrong);
}

// A text without blanks at its ends; of NULL, an empty one.
static char *trim(char *s) {
    if (!s) return "";
    s += strspn(s, " \t");
    for (size_t n = strlen(s); n && strchr(" \t", s[n - 1]); n--) s[n - 1] = 0;
    return s;
}

// Runs a command that was typed in a chat.
static void chat_command(Machine *w, Decoder *d, char *line) {
    char *name = strtok(line, " \t"), *path = trim(strtok(NULL, ""));
    jmp_buf failed;
    bool save = !strcmp(name, "/save"), file = save || !strcmp(name, "/load");
    if (file && (!*path || !strcmp(path, "-"))) fprintf(stderr, "%s needs a file\n", name);
    else if (file && (same_file(path, w->o->session) || same_file(path, w->m->path) ||
                      same_file(path, w->t->path) || same_file(path, w->o->output)))
        fprintf(stderr, "%s: %s is in use\n", name, path);
    else if (file) {
        const volatile int before = n_unfinished;
        if (!setjmp(failed)) {
            recovery = &failed;
            if (save) save_conversation(w, d, path);
            else load_conversation(w, d, path);
            fprintf(stderr, "%s: %zu tokens\n", path, d->ids.n);
        } else if (n_unfinished > before) {
            unlink(unfinished[before].temporary);
            n_unfinished = before;
            close(unfinished[before].fd);
            free(unfinished[before].temporary);
        }
        recovery = NULL;
    } else if (!strcmp(name, "/clear")) rewrite(w, d, 0, NULL, 0), w->turns.n = 0;
    else if (!strcmp(name, "/undo")) {
        if (!w->turns.n) fprintf(stderr, "there is no turn to take back\n");
        else rewrite(w, d, w->turns.ids[--w->turns.n], NULL, 0);
    } else if (!strcmp(name, "/stats")) {
        fprintf(stderr, "%zu of %d tokens, %.1f MB of keys and values; last turn: %.1f tok/s\n",
                d->ids.n, w->ctx, (double)trunk_bytes(&w->kv, d->done) / 1e6, w->rate);
    } else {
        if (strcmp(name, "/help")) fprintf(stderr, "%s is not a command; these are:\n", name);
        fputs("/clear       forget the conversation\n/undo        take the last turn back\n"
              "/save FILE   keep the conversation in a file\n"
              "/load FILE   go on with one from a file\n/stats       its size and speed\n"
              "Ctrl-C ends an answer, Ctrl-D the chat\n", stderr);
    }
}

// The next line of stdin without its end; one with s NULL at the end of stdin.
static Text read_line(bool prompt) {
    char *s = NULL;
    size_t capacity = 0;
    for (;;) {
        if (prompt) fputs("> ", stderr);
        errno = 0;
        ssize_t n = getline(&s, &capacity, stdin);
        if (n >= 0) {
            interrupted = 0;
            while (n && (s[n - 1] == '\n' || s[n - 1] == '\r')) n--;
            s[n] = 0;
            return (Text){s, (size_t)n};
        }
        if (errno != EINTR || interrupted == SIGTERM) break;
        clearerr(stdin);  // Ctrl-C drops the line; a second one ends the program
        if (prompt) fputs("\n(Ctrl-D ends the chat)\n", stderr);
    }
    if (interrupted == SIGINT) interrupted = 0;  // at the prompt there was nothing to end
    free(s);
    return (Text){NULL, 0};
}

// Appends a user's turn to the conversation. False, after a word on stderr, if there is no room.
static bool add_turn(Machine *w, Decoder *d, Text user) {
    const Tokenizer *t = w->t;
    Text system = {w->o->system, w->o->system ? strlen(w->o->system) : 0};
    size_t start = d->ids.n;
    Prompt p = {0};
    if (start) append(&p, t->chat[ASSISTANT_AFTER], false);
    size_t head_end = append_turn(&p, t, start == 0, system, user);
    size_t n = encode_if_short(t, (Text){p.s, p.n}, p.typed, start == 0, w->ctx, &d->ids);
    if (!start && !n) die("%s has no token for any byte of this turn", t->path);
    bool fits = start + n <= (size_t)w->ctx || n <= (size_t)w->ctx / 2;
    if (!fits) {
        fprintf(stderr, "run: this turn has %s%zu tokens, too many for the context of %d, of which "
                        "%zu are in use: it is left out\n",
                d->ids.n == start ? "over " : "", n, w->ctx, start);
        d->ids.n = start;
    } else if (!start) {  // the system turn stays when the context is full
        Ids head = {0};
        encode(t, (Text){p.s, head_end}, p.typed, true, &head);
        d->keep = head.n > 4 ? (int)head.n : 4;
        if (d->keep > (int)n) d->keep = (int)n;
        free(head.ids);
    }
    free(p.s);
    free(p.typed);
    return fits;
}

// Appends a user's turn and the model's reply.
static void take_turn(Machine *w, Decoder *d, Text user) {
    const Options *o = w->o;
    int start = (int)d->ids.n;
    if (!add_turn(w, d, user)) return;
    double began = seconds();
    push(&w->turns, start);
    d->budget = o->steps > 0 ? o->steps : w->ctx;
    d->n_new = 0;
    d->text.n = d->text.n_held = 0;
    int after = start ? LATER_AFTER : o->system ? USER_AFTER_SYSTEM : USER_AFTER;
    start_thoughts(d->out, o, !w->t->llama2c, w->t->chat[after]);
    continue_text(w, d);
    make_room(w, d);  // before the next turn comes, as where a session is closed here
    w->rate = d->n_new / (seconds() - began);
    if (interrupted == SIGINT) interrupted = 0;
}

static void chat(const Options *o, const Model *m, const Tokenizer *t, Text first, Output *out) {
    if (!t->chat[USER_BEFORE].len && !t->chat[USER_AFTER].len)
        die("%s has no chat format: its model continues texts (-m generate)", t->path);
    if (o->system && !t->chat[SYSTEM_BEFORE].len && !t->chat[USER_BEFORE_SYSTEM].len)
        die("the chat format of %s has no place for a system turn (-y)", t->path);
    Machine w;
    Decoder d;
    bool terminal = isatty(0) && !o->quiet;
    open_machine(&w, &d, o, m, t, out);
    w.chatting = true;
    tell_seed(&w, &d);
    if (d.ids.n && o->system && !o->quiet)
        fprintf(stderr, "(-y has no effect: the session has its system turn already)\n");
    for (bool given = first.s; interrupted != SIGTERM; given = false) {
        Text user = given ? first : read_line(terminal);
        if (!user.s) break;
        if (!given && user.s[0] == '/') chat_command(&w, &d, (char *)(uintptr_t)user.s);
        else if (user.len) take_turn(&w, &d, user);
        if (!given) free((char *)(uintptr_t)user.s);
    }
    if (o->receipt && o->samples < 2) print_receipt(&d);
    close_machine(&w, &d);
}

// ---- explain: watch it think, in the terminal, as a page (-o), or stage by stage (--trace)

enum { COLUMNS = 79, LIKELY = 5 };

typedef struct {
    Machine w;
    Decoder d;
    FILE *f;          // what is shown, in memory until it is complete
    int n;            // tokens so far; the pass computes the last of them, and the next is chosen
    float *weights;   // (n_layers * n_heads + 1, ctx) attention paid to each token; last the mean
    float *logits;    // (n_layers, vocab_size) what the classifier makes of x after each layer
    Candidate lens[MAX_LAYERS];  // the likeliest token by these
    int rank;         // of the chosen one among d.s.candidates, which are sorted
    float least;      // the page leaves smaller weights out
    bool color;
    int column;       // of the line being written
    char marks[COLUMNS + 1];  // the digits below it
} Explain;

// Takes a character off a text and writes it to out: itself, or an escape for what a terminal would
// obey or hide. Returns its width in columns.
static int next_shown(Text *text, char out[16]) {
    size_t used;
    const char *s = text->s;
    uint32_t c = next_char(s, text->len, &used);
    text->s += used, text->len -= used;
    if (c == '\n') return snprintf(out, 16, "\\n");
    if (c < 32 || (c >= 127 && c < 160) || (c == 0xfffd && used == 1))
        return snprintf(out, 16, "\\x%02x", c < 160 ? (unsigned)c : (uint8_t)*s);
    if (c == 0xad || (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) ||
        (c >= 0x2060 && c <= 0x206f) || c == 0xfeff || c >= 0xe0000)
        return snprintf(out, 16, "\\u%04x", (unsigned)c);
    snprintf(out, 16, "%.*s", (int)used, s);
    bool wide = (c >= 0x1100 && c < 0x1160) || (c >= 0x2e80 && c < 0xd7b0) ||
                (c >= 0xf900 && c < 0xfb00) || (c >= 0xfe30 && c < 0xfe70) ||
                (c >= 0xff00 && c < 0xff61) || c >= 0x1f300;
    return 1 + wide;
}

// A token as it is stored; control tokens have a text here.
static Text token_text(const Tokenizer *t, int id) {
    return id < t->h.vocab_size ? t->tokens[id].text : (Text){"", 0};
}

// A token's text as it is shown, in at most 37 columns. Returns its width.
static int show(const Explain *e, int id, char out[160]) {
    Text text = token_text(e->w.t, id);
    char c[16];
    int width = 0, n = 0;
    for (out[0] = 0; text.len; width += next_shown(&text, c), n += sprintf(out + n, "%s", c))
        if (width >= 28) return sprintf(out + n, ".."), width + 2;
    return width;
}

static void put_json(FILE *f, Text text) {  // a string that can stand in a script element
    char c[16];
    for (fputc('"', f); text.len;) {
        next_shown(&text, c);
        fprintf(f, "%s%s", *c == '"' || *c == '\\' ? "\\" : "", *c == '<' ? "\\u003c" : c);
    }
    fputc('"', f);
}

static void end_line(Explain *e) {
    e->marks[e->column] = 0;
    fputc('\n', e->f);
    if (e->marks[strspn(e->marks, " ")]) fprintf(e->f, "%s\n", e->marks);
    e->column = 0;
}

// Writes text that stays on one line, with a shade: as a background, or as digits below.
static void put_piece(Explain *e, const char *s, int width, int level) {
    static const int shades[] = {0, 52, 88, 124, 160, 166, 208, 214, 226};
    if (e->column + width > COLUMNS) end_line(e);
    if (e->color && level)
        fprintf(e->f, "\033[48;5;%d;38;5;%dm%s\033[0m", shades[level], level < 5 ? 231 : 16, s);
    else fputs(s, e->f);
    for (int i = 0; i < width; i++)
        e->marks[e->column++] = (char)(!level || e->color || s[i] == ' ' ? ' ' : '0' + level);
}

// ---- explain: one pass

static float *weights_of(const Explain *e, int layer, int head) {
    return e->weights + (size_t)(layer * e->w.m->c.n_heads + head) * (size_t)e->w.ctx;
}

// A line of the trace: what was computed, how many numbers it is, their norm sqrt(sum of x^2), and
// the first of them.
static void put_stage(Explain *e, const char *name, const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    fprintf(e->f, "%-29s %7d %10.4g ", name, n, sqrt(sum));
    for (int i = 0; i < 3 && i < n; i++) fprintf(e->f, " %9.3g", (double)x[i]);
    fputc('\n', e->f);
}

// What forward calls with the values of each stage: keeps those that are shown, or traces them.
static void watch(void *observer, const char *name, int layer, const float *x, int n, int width) {
    Explain *e = observer;
    const Options *o = e->w.o;
    const Model *m = e->w.m;
    bool residual = !strcmp(name, "x");
    int head = o->head < 0 ? 0 : (int)o->head;
    char title[40];
    if (!strcmp(name, "attention"))
        memcpy(weights_of(e, layer, n), x, (size_t)width * sizeof(float));
    if (residual && layer >= 0)
        rmsnorm(row_of(e->w.kv.state->xb, 1 + layer, width), x, vec(&m->final_norm), width,
                m->c.norm_eps);
    if (!o->trace || !strcmp(name, "attention")) return;
    if (layer >= 0 && layer < m->c.n_layers && o->layer >= 0 && layer != o->layer) return;
    if (!strcmp(name, "xb = attn_norm(x)")) fprintf(e->f, "layer %d\n", layer);
    snprintf(title, sizeof title, "attention of head %d", head);
    if (!strncmp(name, "att_out", 7))  // the weights of all heads are there now
        put_stage(e, title, weights_of(e, layer, head), e->n);
    put_stage(e, !residual ? name : layer < 0 ? "x = token_embedding[token]" : "x += xb", x, width);
}

// Computes the last of n tokens and returns the logits of the next. The logit lens (nostalgebraist,
// "interpreting GPT: the logit lens", 2020): what the model would answer if a layer were its last.
static const float *watched_pass(Explain *e, int n) {
    const Model *m = e->w.m;
    int L = m->c.n_layers, H = m->c.n_heads, vocab = m->c.vocab_size, best[MAX_LAYERS];
    int l0 = (int)e->w.o->layer, h0 = (int)e->w.o->head, summed = 0;
    double nll[MAX_LAYERS];
    // A row for the pass, and behind it one for each layer's lens.
    Pass f = {.m = m, .kv = &e->w.kv, .s = get_state(&e->w.kv, 1 + L), .n = L};
    e->n = n;
    const float *logits = forward(m, &e->w.kv, &(Slot){e->d.ids.ids[n - 1], n - 1, 0, true}, 1);
    if (e->w.o->trace) return logits;
    matmul(&f, row_of(f.s->xb, 1, m->c.dim), (Product[]){{&m->classifier, e->logits, vocab}}, 1);
    for (int l = 0; l < L; l++) best[l] = argmax(e->logits + (size_t)l * (size_t)vocab, vocab);
    parallel(surprise_task, &(Score){e->logits, vocab, best, nll}, L);
    for (int l = 0; l < L; l++) e->lens[l] = (Candidate){(float)exp_double(-nll[l]), best[l]};
    float *mean = weights_of(e, L, 0);
    memset(mean, 0, (size_t)n * sizeof(float));
    for (int i = 0; i < L * H; i++)
        if ((l0 < 0 || i / H == l0) && (h0 < 0 || i % H == h0))
            add(mean, weights_of(e, 0, i), n), summed++;
    for (int i = 0; i < n; i++) mean[i] /= (float)summed;
    return logits;
}

// Sorts all tokens by d.s.p and finds the chosen one's rank.
static void rank_tokens(Explain *e, int chosen) {
    Candidate *c = e->d.s.candidates;
    for (int i = 0; i < e->d.s.vocab_size; i++) c[i] = (Candidate){e->d.s.p[i], i};
    qsort(c, (size_t)e->d.s.vocab_size, sizeof *c, by_probability);
    for (e->rank = 0; c[e->rank].token != chosen;) e->rank++;
}

// The rank of what is listed i-th, -1 after the last: the five likeliest, and the chosen one if it
// is not among them.
static int listed(const Explain *e, int i) {
    int n = e->d.s.vocab_size < LIKELY ? e->d.s.vocab_size : LIKELY;
    return i < n ? i : i == n && e->rank >= n ? e->rank : -1;
}

static void put_reason(Explain *e, bool given) {
    const Sampler *s = &e->d.s;
    int kept = s->kept ? s->kept : s->vocab_size;
    float sum = 0, from = 0, to = 0;
    for (int i = 0; i < kept; i++) {  // the tokens' parts of the line from 0 to 1
        Candidate c = s->kept ? s->candidates[i] : (Candidate){s->p[i], i};
        if (c.token == s->candidates[e->rank].token) from = sum, to = sum + c.p;
        sum += c.p;
    }
    if (given) fprintf(e->f, "given; it is number %d of the model's own guesses", e->rank + 1);
    else if (s->temperature == 0) fputs("the likeliest, as the temperature is 0", e->f);
    else fprintf(e->f, "the number %.4f was drawn; its part is %.4f to %.4f of the %d kept",
                 (double)s->coin, (double)(from / sum), (double)(to / sum), kept);
}

static void put_sampler(Explain *e) {
    const Sampler *s = &e->d.s;
    fprintf(e->f, "temperature %g, top-p %g, top-k %d, min-p %g", (double)s->temperature,
            (double)s->top_p, s->top_k, (double)s->min_p);
}

// ---- explain: the terminal

static void show_choice(Explain *e) {
    char text[160];
    for (int i = 0, rank; (rank = listed(e, i)) >= 0; i++) {
        Candidate c = e->d.s.candidates[rank];
        show(e, c.token, text);
        fprintf(e->f, "%c %5.1f%% %-30.*s \"%s\"\n", rank == e->rank ? '>' : ' ',
                (double)c.p * 100, (int)(c.p * 30 + 0.5f), "##############################", text);
    }
    fputs("> ", e->f);
    put_reason(e, false);
    fputc('\n', e->f);
}

static void show_token(Explain *e) {
    char text[160], item[200];
    const int *ids = e->d.ids.ids;
    int first = e->n, columns = 0, L = e->w.m->c.n_layers, width;
    const float *mean = weights_of(e, L, 0);
    float left_out = 0;
    width = show(e, e->d.s.candidates[e->rank].token, text);
    width += fprintf(e->f, "== position %d: \"%s\" ", e->n, text) - (int)strlen(text);
    fprintf(e->f, "%.*s\n", COLUMNS - width,
            "===============================================================");
    while (first > 0 && columns < 8 * COLUMNS) columns += show(e, ids[--first], text);
    for (int i = 0; i < first; i++) left_out += mean[i];
    width = snprintf(item, sizeof item, "(%d tokens with %.0f%%) ", first, (double)left_out * 100);
    if (first) put_piece(e, item, width, 0);
    for (int i = first; i < e->n; i++) {
        int level = 0;
        while (level < 8 && mean[i] >= 0.005f * (float)(1 << level)) level++;
        width = show(e, ids[i], text);
        put_piece(e, text, width, level);
        if (width > 1 && !strcmp(text + strlen(text) - 2, "\\n")) end_line(e);
    }
    if (e->column) end_line(e);
    show_choice(e);
    put_piece(e, "lens:", 5, 0);
    for (int l = 0, from = 0; l < L; l++) {
        if (l + 1 < L && e->lens[l + 1].token == e->lens[l].token) continue;
        width = show(e, e->lens[l].token, text) - (int)strlen(text);
        if (from < l) width += snprintf(item, sizeof item, " %d-%d \"%s\"", from, l, text);
        else width += snprintf(item, sizeof item, " %d \"%s\"", l, text);
        put_piece(e, item, width, 0);
        from = l + 1;
    }
    end_line(e);
    fputc('\n', e->f);
}

// ---- explain: the page. JSON holds, for each token, its text and what is known of the pass that
// chose it; a script shows it.

static const char PAGE_HEAD[] =
    "<!doctype html><html lang=en><meta charset=utf-8><title>Watch it think</title>\n"
    "<meta name=viewport content='width=device-width'><meta http-equiv=Content-Security-Policy\n"
    "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
    "<style>:root{color-scheme:light dark;--a:255,150,40}\n"
    "@media(prefers-color-scheme:dark){:root{--a:180,80,0}}\n"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:76em;margin:auto;padding:0 1em}\n"
    "h1,h2{font-size:1.1em} select{font:inherit} canvas{width:100%;max-width:26em}\n"
    "#text{line-height:2.1;font-family:monospace;overflow-wrap:anywhere}\n"
    "#text button{all:unset;white-space:pre-wrap;cursor:pointer;padding:.25em 0;\n"
    "border-radius:3px;border-bottom:2px solid rgb(var(--a))}\n"
    "#text .given{border-color:transparent}\n"
    "#text [aria-pressed=true]{outline:2px solid;outline-offset:1px}\n"
    "#text button:focus-visible,select:focus-visible{outline:3px solid #48f}\n"
    "main{display:grid;gap:2em;grid-template-columns:repeat(auto-fit,minmax(min(100%,20em),1fr))}\n"
    "ol{list-style:none;padding:0} li{display:flex;gap:.6em;font:.9em monospace;white-space:pre}\n"
    "li b{width:9em;overflow:hidden;text-overflow:ellipsis} li i{flex:1;margin:.2em 0}\n"
    "li span{display:block;height:.8em;background:rgb(var(--a))} .chosen{background:#8884}\n"
    "#map{image-rendering:pixelated;outline:1px solid #8884}</style><h1>Watch it think</h1>\n"
    "<p>Choose a token (arrow keys work, too) to see the pass of the model that chose it. It read\n"
    "the tokens before; their shade is the attention it paid to them. Underlined: generated.</p>\n"
    "<div id=text role=group aria-label='The text, token by token'></div>\n"
    "<p id=why aria-live=polite></p><main><section><h2>Likeliest tokens</h2><ol id=likely></ol>\n"
    "<h2>Position</h2><p id=pos></p><canvas id=clocks width=800 height=220 role=img></canvas>\n"
    "</section><section><h2>Attention</h2><label>layer <select id=layer></select></label>\n"
    "<label>head <select id=head></select></label><p id=note></p>\n"
    "<canvas id=map role=img aria-label='Attention of every token'></canvas></section>\n"
    "<section><h2>What each layer would already answer</h2><ol id=lens></ol></section></main>\n"
    "<script type=application/json id=data>\n";
static const char PAGE_DRAW[] =
    "</script><script>\n"
    "const $ = id => document.getElementById(id), D = JSON.parse($('data').textContent);\n"
    "const T = D.tokens, N = T.length, H = D.heads, percent = p => (100 * p).toFixed(1) + '%';\n"
    "const DIGITS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_';\n"
    "let now = 0;\n"
    "const el = (parent, tag, text, properties) => parent.appendChild(\n"
    "  Object.assign(document.createElement(tag), {textContent: text}, properties));\n"
    "// Attention to each token before token i: of one head, or the mean of a layer or of all.\n"
    "function weights(i) {\n"
    "  const layer = +$('layer').value, head = +$('head').value, sum = Array(i).fill(0);\n"
    "  const rows = T[i].rows ||= (T[i].a || '').split(','), first = 1 + layer * H;\n"
    "  const some = layer < 0 ? rows.slice(0, 1)\n"
    "    : head < 0 ? rows.slice(first, first + H) : rows.slice(first + head, first + head + 1);\n"
    "  for (const row of some)\n"
    "    for (let k = 0, j = 0; k < row.length; k += 2) {\n"
    "      const code = DIGITS.indexOf(row[k + 1]);\n"
    "      j += DIGITS.indexOf(row[k]);\n"
    "      if (code) sum[j++] += (code / 63) ** 2 / some.length;\n"
    "    }\n"
    "  return sum;\n"
    "}\n"
    "function bars(id, items, chosen, numbered) {\n"
    "  $(id).replaceChildren();\n"
    "  items.forEach(([text, p], i) => {\n"
    "    const li = el($(id), 'li', numbered ? String(i).padStart(2) : '');\n"
    "    if (i == chosen) li.className = 'chosen';\n"
    "    el(li, 'b', '\"' + text + '\"', {title: text});\n"
    "    el(el(li, 'i'), 'span').style.width = 100 * p + '%';\n"
    "    el(li, 'small', percent(p).padStart(6));\n"
    "  });\n"
    "}\n"
    "function drawMap() {  // row: a token; column: a token before it\n"
    "  const g = $('map').getContext('2d');\n"
    "  const rgb = getComputedStyle(document.documentElement).getPropertyValue('--a');\n"
    "  $('map').width = $('map').height = N;\n"
    "  T.forEach((t, i) => weights(i).forEach((w, j) => {\n"
    "    g.fillStyle = `rgba(${rgb},${Math.sqrt(w)})`;\n"
    "    if (w) g.fillRect(j, i, 1, 1);\n"
    "  }));\n"
    "  g.fillStyle = '#8888', g.fillRect(now, now, N, 1);\n"
    "}\n"
    "// The angles by which rotary embedding turns some pairs of a query or key at a position.\n"
    "function drawClocks(position) {\n"
    "  const g = $('clocks').getContext('2d'), layer = Math.max(0, $('layer').value), said = [];\n"
    "  const freqs = D.freqs[D.local[layer]], n = Math.min(8, freqs.length);\n"
    "  g.setTransform(2, 0, 0, 2, 0, 0), g.clearRect(0, 0, 400, 110);\n"
    "  g.strokeStyle = g.fillStyle = getComputedStyle(document.body).color;\n"
    "  for (let k = 0; k < n; k++) {\n"
    "    const pair = Math.floor(k * freqs.length / n), f = freqs[pair], x = 24 + 50 * k;\n"
    "    const angle = position * f % (2 * Math.PI);\n"
    "    g.beginPath(), g.arc(x, 24, 20, 0, 7), g.moveTo(x, 24);\n"
    "    g.lineTo(x + 20 * Math.cos(angle), 24 - 20 * Math.sin(angle)), g.stroke();\n"
    "    g.fillText('pair ' + pair, x - 15, 62), g.fillText(f.toPrecision(1), x - 15, 78);\n"
    "    said.push(`pair ${pair} at ${angle.toFixed(2)}`);\n"
    "  }\n"
    "  g.fillText('radians per position', 9, 98);\n"
    "  $('clocks').setAttribute('aria-label', 'Angles in radians: ' + said.join(', '));\n"
    "}\n";
static const char PAGE_CHOOSE[] =
    "function choose(i, focus) {\n"
    "  now = Math.max(0, Math.min(N - 1, i || 0));\n"
    "  const t = T[now], w = weights(now), buttons = document.querySelectorAll('#text button');\n"
    "  buttons.forEach((b, j) => {\n"
    "    b.setAttribute('aria-pressed', j == now), b.tabIndex = j == now ? 0 : -1;\n"
    "    b.style.background = w[j] ? `rgba(var(--a),${Math.sqrt(w[j])})` : '';\n"
    "    b.title = w[j] ? 'attention ' + percent(w[j]) : '';\n"
    "  });\n"
    "  if (focus) buttons[now].focus();\n"
    "  $('head').disabled = $('layer').value < 0;\n"
    "  $('why').textContent = `Token ${now}, \"${t.t}\", id ${t.id}: ${t.why || 'the start'}.`;\n"
    "  $('pos').textContent = now ? `The pass was at position ${now - 1}, where pairs of numbers\n"
    "    in queries and keys are turned by these angles. The KV cache then held the keys and\n"
    "    values of ${now} tokens, ${(now * D.kv / 1024).toFixed(1)} KiB.` : '';\n"
    "  bars('likely', t.likely || [], t.k), bars('lens', t.lens || [], -1, true);\n"
    "  history.replaceState(null, '', '#t=' + now);\n"
    "  drawMap(), drawClocks(Math.max(0, now - 1));\n"
    "}\n"
    "for (const [id, n] of [['layer', D.layers], ['head', H]]) {\n"
    "  for (let i = -1; i < n; i++) el($(id), 'option', i < 0 ? 'all (mean)' : i, {value: i});\n"
    "  $(id).onchange = () => choose(now);\n"
    "}\n"
    "T.forEach((t, i) => {\n"
    "  const b = el($('text'), 'button', t.t || ' ', {onclick: () => choose(i)});\n"
    "  if (t.given) b.className = 'given';\n"
    "  if (t.t.endsWith('\\\\n')) el($('text'), 'br');\n"
    "});\n"
    "$('text').onkeydown = e => {\n"
    "  const to = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: N - 1}[e.key];\n"
    "  if (to !== undefined) e.preventDefault(), choose(to, true);\n"
    "};\n"
    "$('map').onclick = e => choose(Math.floor(e.offsetY / $('map').clientHeight * N));\n"
    "$('note').textContent = `Each row is a token, each column one before it. Weights under\n"
    "  ${percent(D.least)} are left out. Sampled with ${D.sampler}.`;\n"
    "matchMedia('(prefers-color-scheme: dark)').onchange = () => choose(now);\n"
    "onhashchange = () => choose(+location.hash.slice(3));\n"
    "choose(location.hash ? +location.hash.slice(3) : N - 1);\n"
    "</script>\n";

static void put_share(Explain *e, Candidate c) {
    fputc('[', e->f);
    put_json(e->f, token_text(e->w.t, c.token));
    fprintf(e->f, ",%.4g]", (double)c.p);
}

// A row of weights, those of at least `least`: for each two digits to the base 64, how many
// positions are skipped before it, and 63 sqrt(weight).
static void put_weights(FILE *f, const float *w, int n, float least) {
    static const char digits[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for (int i = 0, skip = 0; i < n; i++, skip++) {
        if (!(w[i] >= least)) continue;
        for (; skip > 63; skip -= 63) fputs("_A", f);
        fprintf(f, "%c%c", digits[skip], digits[(int)(63 * sqrtf(w[i]) + 0.5f)]);
        skip = -1;
    }
}

static void page_begin(Explain *e, int end) {
    const Config *c = &e->w.m->c;
    int half = c->head_dim / 2, first = e->d.ids.ids[0];
    double rows = (double)c->n_layers * c->n_heads * end;
    e->least = rows < 1e5 ? 0.01f : rows < 2e6 ? (float)(rows / 1e7) : 0.2f;
    fprintf(e->f, "%s{\"layers\":%d,\"heads\":%d,\"kv\":%ld,\"local\":[", PAGE_HEAD, c->n_layers,
            c->n_heads, (long)(e->w.kv.chunk_bytes / CHUNK));
    for (int l = 0; l < c->n_layers; l++) fprintf(e->f, l ? ",%d" : "%d", is_local(c, l));
    for (int i = 0; i < 2 * half; i++)
        fprintf(e->f, "%s%g", i == 0 ? "],\"freqs\":[[" : i == half ? "],[" : ",",
                (double)vec(&e->w.m->rope_freqs[i / half])[i % half]);
    fprintf(e->f, "]],\"least\":%g,\"sampler\":\"", (double)e->least);
    put_sampler(e);
    fputs("\",\"tokens\":[\n{\"t\":", e->f);
    put_json(e->f, token_text(e->w.t, first));
    fprintf(e->f, ",\"id\":%d,\"given\":1}", first);
}

static void page_token(Explain *e, bool given) {
    int L = e->w.m->c.n_layers, H = e->w.m->c.n_heads, chosen = e->d.s.candidates[e->rank].token;
    fputs(",\n{\"t\":", e->f);
    put_json(e->f, token_text(e->w.t, chosen));
    fprintf(e->f, ",\"id\":%d,\"given\":%d,\"k\":%d,\"why\":\"", chosen, given,
            e->rank < LIKELY ? e->rank : LIKELY);
    put_reason(e, given);
    for (int i = 0; listed(e, i) >= 0; i++)
        fputs(i ? "," : "\",\"likely\":[", e->f), put_share(e, e->d.s.candidates[listed(e, i)]);
    for (int l = 0; l < L; l++) fputs(l ? "," : "],\"lens\":[", e->f), put_share(e, e->lens[l]);
    fputs("],\"a\":\"", e->f);
    put_weights(e->f, weights_of(e, L, 0), e->n, 0.001f);
    for (int i = 0; i < L * H; i++)
        fputc(',', e->f), put_weights(e->f, weights_of(e, 0, i), e->n, e->least);
    fputs("\"}", e->f);
}

// Computes the pass of token n - 1 and shows it. Returns the token that follows: one that is given,
// or one that is drawn.
static int explain_pass(Explain *e, int n, bool given, bool page) {
    const Model *m = e->w.m;
    const int *ids = e->d.ids.ids;
    Sampler *s = &e->d.s;
    char title[40];
    snprintf(title, sizeof title, "token %d at position %d", ids[n - 1], n - 1);
    if (e->w.o->trace) fprintf(e->f, "%-29s %7s %10s  first values\n", title, "width", "norm");
    const float *logits = watched_pass(e, n);
    int next = given ? ids[n] : sample(s, logits, ids, n);
    if (given) memcpy(s->p, logits, (size_t)m->c.vocab_size * sizeof(float));
    if (given || s->temperature == 0) softmax(s->p, 0, m->c.vocab_size);
    rank_tokens(e, next);
    if (page) page_token(e, given);
    else if (e->w.o->trace) show_choice(e);
    else show_token(e);
    return next;
}

static void explain(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    const Config *c = &m->c;
    Text prompt = input_text(o);
    if (o->layer >= c->n_layers || o->head >= c->n_heads)
        die("--layer goes from 0 to %d and --head to %d in %s", c->n_layers - 1, c->n_heads - 1,
            m->path);
    size_t L = (size_t)c->n_layers, vocab = (size_t)c->vocab_size, size = 0;
    char *shown = NULL, *no_color = getenv("NO_COLOR");
    bool page = o->output && !o->trace;
    Explain e = {.color = !o->output && isatty(1) && !(no_color && *no_color)};
    open_machine(&e.w, &e.d, o, m, t, out);
    e.w.kv.plain_attention = true;
    Ids *ids = &e.d.ids;
    int ctx = e.w.ctx;
    long long budget = start_text(o, m, t, ctx, prompt, ids);
    int n_prompt = (int)ids->n, end = ctx - n_prompt < budget ? ctx : n_prompt - 1 + (int)budget;
    size_t bytes = (L * (size_t)c->n_heads + 1) * (size_t)ctx * sizeof(float);
    e.weights = reserve(1, bytes, "attention weights (-c N makes the context shorter)");
    e.logits = resize(NULL, L * vocab, sizeof(float));
    e.f = open_memstream(&shown, &size);
    if (!e.f) die("out of memory");
    int n = page ? 1 : n_prompt;  // the page shows the prompt's tokens, too
    prefill(m, &e.w.kv, 0, ids->ids, 0, n - 1);
    e.w.kv.observe = watch;
    e.w.kv.observer = &e;
    if (page) page_begin(&e, end);
    else put_sampler(&e), fputc('\n', e.f);
    if (!o->output && !o->trace)
        fputs("shades 1 to 8: a token gets 0.5, 1, 2, 4, 8, 16, 32, 64% of the attention\n"
              "lens: what layer 0, 1, ... would already answer\n\n", e.f);
    for (; n <= end && !interrupted; n++) {
        bool given = n < n_prompt;
        int next = explain_pass(&e, n, given, page);
        if (fflush(e.f) || ferror(e.f)) die("out of memory for what explain shows");
        if (!page) write_output(out, shown, size), rewind(e.f);
        if (given) continue;
        if (is_stop(t, next)) break;
        push(ids, next);
    }
    if (n > ctx && budget > n - n_prompt && !o->quiet)
        fprintf(stderr, "the context of %d positions is full: explain ends here\n", ctx);
    if (page) fprintf(e.f, "]}\n%s%s", PAGE_DRAW, PAGE_CHOOSE);
    if (ferror(e.f) | fclose(e.f)) die("out of memory for what explain shows");
    if (page) write_output(out, shown, size);
    free(shown);
    free(e.logits);
    munmap(e.weights, bytes);
    close_machine(&e.w, &e.d);
    free((char *)(uintptr_t)prompt.s);
}

// ---- tokenize and logits: for scripts

static void tokenize(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    Text text = input_text(o);
    (void)m;
    Ids ids = {0};
    encode(t, text, NULL, true, &ids);
    char *line = resize(NULL, ids.n + 1, 16);
    size_t n = 0;
    for (size_t i = 0; i < ids.n; i++)
        n += (size_t)snprintf(line + n, 16, i ? " %d" : "%d", ids.ids[i]);
    line[n++] = '\n';
    write_output(out, line, n);
    free(line);
    free(ids.ids);
    free((char *)(uintptr_t)text.s);
}

static void write_logits(const Options *o, const Model *m, const Tokenizer *none, Output *out) {
    Text text = input_text(o);
    Ids ids = {0};
    for (char *p = (char *)(uintptr_t)text.s, *end;; p = end) {
        while (*p == ' ' || (*p >= '\t' && *p <= '\r')) p++;
        if (!*p && p == text.s + text.len) break;
        long id = strtol(p, &end, 10);
        if (end == p || id < 0 || id >= m->c.vocab_size)
            die("token id \"%.20s\" is not a number from 0 to %d", p, m->c.vocab_size - 1);
        push(&ids, (int)id);
    }
    Machine w;
    Decoder d;
    open_machine(&w, &d, o, m, none, out);
    if (!ids.n) die("no token ids: give them with -i or -f (- is stdin)");
    if (ids.n + d.ids.n > (size_t)w.ctx)
        die("%zu tokens are more than the context of %d", ids.n + d.ids.n, w.ctx);
    fill(&w, &d, (int)d.ids.n);
    if (!d.ids.n) d.keep = ids.n < 4 ? (int)ids.n : 4;
    for (size_t i = 0; i < ids.n; i++) push(&d.ids, ids.ids[i]);
    Slot batch[MAX_BATCH];
    while (d.done < (int)d.ids.n && !interrupted) {
        int n = 0;
        for (; n < logits_batch(m) && d.done + n < (int)d.ids.n; n++)
            batch[n] = (Slot){d.ids.ids[d.done + n], d.done + n, 0, true};
        reserve_session(&w.session, &w.kv, d.done + n);
        const float *logits = forward(m, &w.kv, batch, n);
        write_output(out, logits, (size_t)n * (size_t)m->c.vocab_size * sizeof(float));
        d.done += n;
        save_decoder(&w, &d, d.done);
    }
    free(ids.ids);
    free((char *)(uintptr_t)text.s);
    close_machine(&w, &d);
}

// ---- eval: how well the model predicts a text

// Strided windows: a window of W tokens starts every W/2 tokens; each token is predicted once, in
// the first window that holds it, so all but the first window's tokens see at least W/2 tokens
// before them.
static void evaluate(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    Text text = input_text(o);
    if (!text.len) die("no text to evaluate in %s: give one with -f or -i (- is stdin)",
                       o->prompt_file ? o->prompt_file : o->prompt ? "-i" : "the command");
    int start = t->h.bos >= 0 ? t->h.bos : t->h.eos;
    if (start < 0) die("%s has neither BOS nor EOS to start a text from", m->path);
    Ids ids = {0};
    push(&ids, start);
    encode(t, text, NULL, true, &ids);
    bool twice = ids.n > 1 && ids.ids[1] == start;
    const int *all = ids.ids + twice;
    int n_all = (int)ids.n - twice, ctx = context_of(o, m), scored = 0;
    if (n_all < 2) die("no text to evaluate: it is only the token that starts a text");
    int window = o->context || ctx < 2048 ? ctx : 2048;
    if (window < 2) die("-c %d is too short to evaluate with", window);
    Cache kv;
    new_cache(&kv, m, window, 0, 0);
    double sum = 0;
    Progress progress = {.on = !o->quiet && isatty(2), .began = seconds()};
    for (int from = 0; scored < n_all - 1 && !interrupted; from += window / 2) {
        int end = from + window < n_all - 1 ? from + window : n_all - 1;
        sum += score_window(m, &kv, all, from, end, scored);
        scored = end;
        double part = (double)scored / (n_all - 1);
        show_progress(&progress, part, part * (double)text.len);
    }
    end_progress(&progress);
    if (!interrupted) {
        double bits = sum / 0.69314718055994531;
        char report[400];
        int n = snprintf(report, sizeof report,
                         "bits_per_byte: %.6f\nbits_per_token: %.6f\nperplexity: %.4f\ntokens: %d\n"
                         "bytes: %zu\nwindow: %d\n", bits / (double)text.len, bits / scored,
                         exp_double(sum / scored), scored, text.len, window);
        write_output(out, report, (size_t)n);
    }
    free(ids.ids);
    free((char *)(uintptr_t)text.s);
    free_cache(&kv);
}

// ---- compress and decompress: prediction is compression
//
// A token of probability p costs -log2 p bits in an arithmetic coder, so a text that the model
// predicts well becomes small. The decoder runs the same model on the same tokens and has, to the
// last bit, the same probabilities. What the model does not know of this very text is learned on
// the way, after each token, by encoder and decoder alike.
//
// A block of text is cut at ends of lines into segments of about equally many tokens, which are
// coded in lockstep: the first token of each, then the second of each, and so on. So the decoder
// decodes all segments as one batch, and all of them learn from each other. Each starts from the
// same context: the end of the block before, or the text's first tokens, which are coded alone.
//
// The file: magic and context, fingerprints of model and tokenizer; then blocks: a BlockHead, the
// coded bytes, a checksum of all up to here.

enum {
    BLOCK = 1 << 20,                    // bytes of text, at most, that are coded together
    SEGMENTS = 16, SHORTEST = 2250,     // at most so many, of at least so many pieces
    USUAL_CONTEXT = 1024,               // positions
    SHORTEST_CONTEXT = 16,
    GROUP = 256,                        // tokens whose frequencies are summed together
    CUT = 32,                           // segments end earlier by at most their 32nd part
    PLACES = 64,                        // places in a line: not known, bytes 0 and 1, 2 and 3 ...
    LISTS = 4, ALL_LISTS = 1 << 20,     // of biases: those that hold for a token; all
    MOST_LOCAL = 1 << 22, MOST_SEEN = 3,  // places in lists; times that a token is counted
    MAGIC = 0x617a6d6c,                 // "lmza"
};

typedef struct {
    uint32_t bytes, pieces, coded;  // bytes of text; tokens and raw runs; coded bytes
    uint16_t segments, last;
    uint64_t hash;                  // of all text up to here
} BlockHead;  // coded == bytes: the text is stored as it is

typedef struct { int token; uint32_t start, len; } Piece;  // token -1: len bytes of raw from start
typedef struct {
    Piece *pieces;  // of the block's text, in order
    int n, segments;
    uint8_t *raw;   // encoding: the text; decoding: the bytes that no token stands for
    size_t n_raw, n_bytes;
} Block;

// The arithmetic coder: what is coded so far says that the number lies in [low, low + range), of
// which the next symbol takes its share. Leading bytes that are certain are written, and the rest
// moves up (carryless, after D. Subbotin). The decoder knows the number's next 64 bits: code.
typedef struct {
    bool decoding;
    uint64_t low, range, code;
    uint8_t *bytes;
    size_t n, size;  // bytes written or read; room or length
} Coder;

// A bit that is predicted from how often it was set: a probability in 2^-32.
typedef struct { uint32_t one, seen; } Bit;

// What is added to a logit, and the sum of its squared gradients.
typedef struct { float value, squares; } Bias;

// A token that was seen in a context (after some tokens, or at a place in the line).
typedef struct { int token, seen; Bias bias; } LocalBias;
typedef struct { int first, n; } List;  // n local biases lie together; the room is a power of 2

typedef struct {
    const Model *m;
    const Tokenizer *t;
    Cache kv;         // the trunk holds the prefix, branch 1 + s segment s
    int context, start, line_end, n_groups;
    size_t block;     // bytes of a block
    int shortest;     // pieces of a segment
    Ids tail;         // `start` and the last tokens: the next segments' prefix and first input
    Coder coder;
    float *bias;      // (vocab_size) added to the logits: what is frequent in this text
    float *squares;   // (vocab_size) the sum of its squared gradients
    Bias scale;       // the logits are multiplied by 1 + scale
    LocalBias *local; // what the lists hold
    int n_local, local_capacity;
    List *all_lists;  // (ALL_LISTS) by a hash of the context
    Bias trust[LISTS][MOST_SEEN + 1];  // what tokens that were seen so often have beside their own
    List *lists[SEGMENTS][LISTS];  // those that hold for a segment's next token
    int column[SEGMENTS];     // bytes of its line before it; -1: not known
    Bit escape[2], tree[256];
    const float *logits[SEGMENTS];  // for this step; NULL: it has ended, or coded raw bytes
    int token[SEGMENTS];            // what this step's piece was
    float *p, mean[SEGMENTS];  // (SEGMENTS, vocab_size) probabilities; the logits' mean by these
    uint32_t *sums;   // (SEGMENTS, n_groups) frequencies of GROUP tokens
    Progress progress;
    double bytes, part, block_part;  // text done; of the file: part done, part that this block is
} Codec;

// ---- The coder

static void shift_out(Coder *c) {
    if (c->decoding) c->code = c->code << 8 | (c->n < c->size ? c->bytes[c->n] : 0);
    else {
        if (c->n == c->size) c->bytes = resize(c->bytes, c->size = c->size * 2 + 4096, 1);
        c->bytes[c->n] = (uint8_t)(c->low >> 56);
    }
    c->n++, c->low <<= 8, c->range <<= 8;
}
// The interval becomes `size` units of itself, from the unit `start` on.
static void narrow(Coder *c, uint64_t start, uint64_t size, uint64_t unit) {
    const uint64_t top = 1ull << 56, bottom = 1ull << 48;
    c->low += start * unit;
    c->range = size * unit;
    while ((c->low ^ (c->low + c->range)) < top || c->range < bottom) {
        if ((c->low ^ (c->low + c->range)) >= top) c->range = -c->low & (bottom - 1);
        shift_out(c);
    }
}
// Starts a coder, for decoding with `size` bytes to read.
static void start_coder(Coder *c, bool decoding, size_t size) {
    *c = (Coder){.decoding = decoding, .bytes = c->bytes, .size = decoding ? size : c->size};
    for (int i = 0; i < 8 && decoding; i++) shift_out(c);
    c->low = 0, c->range = UINT64_MAX;
}
// Writes up to two bytes that, zeros behind them, lie in the interval: its size is 2^48 or more.
static void finish_coder(Coder *c) {
    for (c->low = (c->low + (1ull << 48) - 1) >> 48 << 48; c->low;) shift_out(c);
}

// These code a value, or return the decoded one.
static int code_bit(Coder *c, Bit *b, int bit) {
    uint64_t unit = c->range >> 32;
    if (c->decoding) bit = (c->code - c->low) / unit < b->one;
    narrow(c, bit ? 0 : b->one, bit ? b->one : (1ull << 32) - b->one, unit);
    b->one += bit ? (UINT32_MAX - b->one) / (b->seen + 2) : -(b->one / (b->seen + 2));
    b->seen += b->seen < 255;
    return bit;
}
// A token: its share of the interval is its probability in 2^-30, rounded down, plus 1.
static uint32_t frequency(float p) { return (uint32_t)(int32_t)(p * 0x1p30f) + 1; }
static int code_token(Codec *z, int s, int token) {
    Coder *c = &z->coder;
    const float *p = z->p + (size_t)s * (size_t)z->m->c.vocab_size;
    const uint32_t *sums = z->sums + (size_t)s * (size_t)z->n_groups;
    uint64_t total = sums[0], start = 0;
    for (int g = 1; g < z->n_groups; g++) total += sums[g];
    uint64_t unit = c->range / total, at = c->decoding ? (c->code - c->low) / unit : 0;
    if (at >= total) at = total - 1;
    int i = 0;
    for (; c->decoding ? start + sums[i / GROUP] <= at : i + GROUP <= token; i += GROUP)
        start += sums[i / GROUP];
    for (; c->decoding ? start + frequency(p[i]) <= at : i < token; i++) start += frequency(p[i]);
    narrow(c, start, frequency(p[i]), unit);
    return i;
}

// ---- What is learned from the text: biases of each token v, which are added to its logit. One
// always holds, others after the last one, two and four tokens and at this place in the line, and
// one is common to all tokens that were seen as often in a context of that kind. They move along
// the gradient of ln p(token), which is (v is the token) - p[v], by Adagrad (Duchi et al., 2011):
// steps are divided by the root of the sum of squared gradients. So does a scale of all logits.

static void learn(Bias *b, float gradient, float rate) {
    b->squares += gradient * gradient;
    b->value -= rate * gradient / sqrtf(b->squares + 1.0f);
}

// Probabilities of a segment's next token, and sums of their frequencies for code_token.
static void predict_task(void *context, int s) {
    Codec *z = context;
    int vocab = z->m->c.vocab_size;
    const float *logits = z->logits[s];
    float *p = z->p + (size_t)s * (size_t)vocab, scale = 1.0f + z->scale.value;
    uint32_t *sums = z->sums + (size_t)s * (size_t)z->n_groups;
    if (!logits) return;
    for (int i = 0; i < vocab; i++) p[i] = logits[i] * scale + z->bias[i];
    for (int l = 0; l < LISTS; l++) {
        const LocalBias *b = z->local + z->lists[s][l]->first;
        for (int n = z->lists[s][l]->n; n--; b++)
            p[b->token] += b->bias.value + z->trust[l][b->seen].value;
    }
    softmax(p, 0, vocab);
    z->mean[s] = 0;
    for (int first = 0; first < vocab; first += GROUP) {
        uint32_t sum = 0;
        int n = vocab - first < GROUP ? vocab - first : GROUP;
        for (int i = 0; i < n; i++) sum += frequency(p[first + i]);
        sums[first / GROUP] = sum;
        z->mean[s] += sum16(p + first, logits + first, 0, n);
    }
}

// Adds a token to a list. One that is full moves to where there is twice the room, and the old room
// is lost; when all room is used, such a list learns no more tokens.
static void add_local(Codec *z, List *list, int token) {
    if (!(list->n & (list->n - 1))) {
        int room = list->n ? 2 * list->n : 1;
        if (z->n_local + room > MOST_LOCAL) return;
        while (z->n_local + room > z->local_capacity)
            z->local = resize(z->local, (size_t)(z->local_capacity *= 2), sizeof(LocalBias));
        memcpy(z->local + z->n_local, z->local + list->first, (size_t)list->n * sizeof(LocalBias));
        list->first = z->n_local;
        z->n_local += room;
    }
    z->local[list->first + list->n++] = (LocalBias){.token = token};
}

// Moves the scale, and the biases of the lists that hold for a segment, to which it adds the token.
static void learn_local(Codec *z, int s) {
    static const float rates[LISTS] = {0.25f, 0.25f, 0.25f, 0.15f};
    const float *p = z->p + (size_t)s * (size_t)z->m->c.vocab_size;
    int token = z->token[s];
    learn(&z->scale, z->mean[s] - z->logits[s][token], 0.02f);
    for (int l = 0; l < LISTS; l++) {
        List *list = z->lists[s][l];
        int i = 0;
        while (i < list->n && z->local[list->first + i].token != token) i++;
        if (i == list->n) add_local(z, list, token);
        LocalBias *b = z->local + list->first;
        for (i = 0; i < list->n; i++, b++) {
            float g = p[b->token];
            if (g < 1e-4f && g > -1e-4f) continue;
            if (b->seen) learn(&z->trust[l][b->seen], g, rates[l]);
            learn(&b->bias, g, rates[l]);
            b->seen += b->token == token && b->seen < MOST_SEEN;
        }
    }
}

// Learns from all segments' gradients, of which p now holds minus the values: first what the lists
// hold, which is one piece of work, then the biases of GROUP tokens each.
static void learn_task(void *context, int item) {
    Codec *z = context;
    if (!item) {
        for (int s = 0; s < SEGMENTS; s++)
            if (z->logits[s]) learn_local(z, s);
        return;
    }
    int vocab = z->m->c.vocab_size, first = (item - 1) * GROUP;
    int n = vocab - first < GROUP ? vocab - first : GROUP;
    float sum[GROUP] = {0}, *bias = z->bias + first, *squares = z->squares + first;
    for (int s = 0; s < SEGMENTS; s++) {
        const float *p = z->p + (size_t)s * (size_t)vocab + first;
        if (!z->logits[s]) continue;
        for (int i = 0; i < n; i++) sum[i] += p[i];
        for (int i = 0; i < n; i++) squares[i] += p[i] * p[i];
    }
    for (int i = 0; i < n; i++) bias[i] -= 0.6f * sum[i] / sqrtf(squares[i] + 1.0f);
}

static void forget(Codec *z) {
    size_t vocab = (size_t)z->m->c.vocab_size;
    memset(z->all_lists, 0, ALL_LISTS * sizeof(List));
    memset(z->trust, 0, sizeof z->trust);
    z->n_local = 0;
    z->scale = (Bias){0};
    memset(z->bias, 0, vocab * sizeof(float));
    memset(z->squares, 0, vocab * sizeof(float));
    for (int i = 0; i < 256; i++) z->tree[i] = (Bit){1u << 31, 0};
    z->escape[0] = (Bit){1u << 24, 0}, z->escape[1] = z->tree[0];
    z->tail.n = 0;
    push(&z->tail, z->start);
}

// ---- Blocks

// Positions that all segments share. (Attention is fastest where it is a multiple of 16.)
static int prefix_of(const Codec *z) { return z->context / 4; }

// Pieces of a block that are coded in lockstep as n segments: [first[s], first[s + 1]).
typedef struct { Block *b; int n, first[SEGMENTS + 1]; } Span;

static int length_of(const Span *span, int s) { return span->first[s + 1] - span->first[s]; }

// The token of a piece.
static int token_of(const Codec *z, const Piece *p) { return p->token < 0 ? z->start : p->token; }

// The token before step t of a segment; before its first, the one behind the prefix, or the end of
// a line, at which it was cut.
static int input_at(const Codec *z, const Span *span, int s, int t) {
    if (t) return token_of(z, &span->b->pieces[span->first[s] + t - 1]);
    return s ? z->line_end : z->tail.ids[z->tail.n - 1];
}

// Runs the inputs before steps [from, to) of all segments through the model, which sees these from
// step `base` on.
static float *feed(Codec *z, const Span *span, int from, int to, int base, bool want) {
    int n_slots = 0, trunk = (int)z->tail.n - 1;
    Slot *slots = resize(NULL, SEGMENTS * (size_t)(to - from), sizeof *slots);
    for (int s = 0; s < span->n; s++)
        for (int t = from; t < to && t < length_of(span, s); t++)
            slots[n_slots++] = (Slot){input_at(z, span, s, t), trunk + t - base, 1 + s, want};
    float *logits = forward(z->m, &z->kv, slots, n_slots);
    free(slots);
    return logits;
}

// Codes a segment's piece: a token, or a run of raw bytes, bit by bit, each predicted from the bits
// before it in its byte.
static void code_piece(Codec *z, Block *b, int s, Piece *piece) {
    Coder *c = &z->coder;
    if (!code_bit(c, &z->escape[0], piece->token < 0)) {
        piece->token = code_token(z, s, piece->token);
        z->p[(size_t)s * (size_t)z->m->c.vocab_size + (size_t)piece->token] -= 1;
        z->token[s] = piece->token;
        return;
    }
    z->logits[s] = NULL;  // nothing to be learned
    if (c->decoding) *piece = (Piece){-1, (uint32_t)b->n_raw, 0};
    for (uint32_t i = 0, more = 1; more; i++) {
        int byte = c->decoding ? 0 : b->raw[piece->start + i], node = 1;
        for (int j = 7; j >= 0; j--) node = node * 2 + code_bit(c, &z->tree[node], byte >> j & 1);
        if (c->decoding && b->n_raw == b->n_bytes) break;  // wrong
        if (c->decoding) b->raw[b->n_raw++] = (uint8_t)node, piece->len++;
        more = (uint32_t)code_bit(c, &z->escape[1], i + 1 < piece->len);
    }
}

// Which lists hold for step t of a segment.
static void find_lists(Codec *z, const Span *span, int s, int t) {
    int before = input_at(z, span, s, t), *column = &z->column[s];
    // A model can have more tokens than its tokenizer.
    bool known = before < z->t->h.vocab_size && before != z->start;
    if (!known) *column = -1;
    for (Text x = z->t->tokens[known ? before : 0].text; known && x.len; x.s++, x.len--)
        *column = *x.s == '\n' ? 0 : *column + (*column >= 0 && *column < 2 * PLACES);
    int place = *column < 0 ? 0 : *column / 2 + 1;
    uint64_t hash = ~(uint64_t)(place < PLACES ? place : PLACES - 1);
    z->lists[s][3] = &z->all_lists[mix64(hash) % ALL_LISTS];
    hash = 0;
    for (int i = 0; i < 4; i++) {
        hash = mix64(hash + (i <= t ? (uint64_t)input_at(z, span, s, t - i) + 1 : 0));
        if (i != 2) z->lists[s][i < 2 ? i : 2] = &z->all_lists[hash % ALL_LISTS];
    }
}

// Codes step t of all segments; the logits are those of `some` steps from `from` on.
static void code_step(Codec *z, const Span *span, int t, int from, int some, const float *logits) {
    size_t vocab = (size_t)z->m->c.vocab_size;
    for (int s = 0; s < SEGMENTS; s++) {
        int left = s < span->n ? length_of(span, s) - from : 0;
        z->logits[s] = t - from < left ? logits + (size_t)(t - from) * vocab : NULL;
        if (left > 0) logits += (size_t)(left < some ? left : some) * vocab;
        if (z->logits[s]) find_lists(z, span, s, t);
    }
    parallel(predict_task, z, SEGMENTS);
    for (int s = 0; s < SEGMENTS; s++)
        if (z->logits[s]) code_piece(z, span->b, s, &span->b->pieces[span->first[s] + t]);
    parallel(learn_task, z, 1 + z->n_groups);
}

static void code_span(Codec *z, const Span *span) {
    int begin = span->first[0], end = span->first[span->n], trunk = (int)z->tail.n - 1, steps = 0;
    for (int s = 0; s < span->n; s++)
        steps = length_of(span, s) > steps ? length_of(span, s) : steps;
    int longest = z->m->c.seq_len - prefix_of(z);  // the positions that there are
    int again = longest / 2 < z->kv.window ? longest / 2 : z->kv.window;
    int most = z->coder.decoding ? 1 : 4 * logits_batch(z->m);
    most = (most < MAX_BATCH ? most : MAX_BATCH) / span->n;
    if (most < 1) most = 1;
    prefill(z->m, &z->kv, 0, z->tail.ids, 0, trunk);
    for (int s = 1; s < z->kv.n_seqs; s++) z->kv.from[s] = trunk;
    for (int t = 0, base = 0, some; t < steps; t += some) {
        if (t - base == longest) {
            base = t - again;
            feed(z, span, base, t, base, false);
        }
        some = base + longest < steps ? base + longest - t : steps - t;
        if (some > most) some = most;
        const float *logits = feed(z, span, t, t + some, base, true);
        for (int k = 0; k < some; k++) code_step(z, span, t + k, t, some, logits);
        if (interrupted) exit(130);
        double done = (begin + (double)t / steps * (end - begin)) / span->b->n;
        show_progress(&z->progress, z->part + done * z->block_part,
                      z->bytes + done * (double)span->b->n_bytes);
    }
    z->column[0] = z->column[span->n - 1];  // there the next block begins
    for (int i = begin; i < end; i++) push(&z->tail, token_of(z, &span->b->pieces[i]));
    int extra = (int)z->tail.n - prefix_of(z) - 1;
    if (extra <= 0) return;
    z->tail.n -= (size_t)extra;
    memmove(z->tail.ids + 1, z->tail.ids + 1 + extra, (z->tail.n - 1) * sizeof(int));
}

// How many lines end just before a piece: more than one if the last of them is empty.
static int lines_before(const Codec *z, const Block *b, int piece) {
    int n = 0;
    while (piece-- && b->pieces[piece].token >= 0) {
        Text x = z->t->tokens[b->pieces[piece].token].text;
        for (; x.len && x.s[x.len - 1] == '\n'; x.len--) n++;
        if (x.len) break;
    }
    return n;
}

// Codes by how many pieces, up to `most`, a segment ends before `piece`: so that the next begins
// after an empty line if there is one, or with a line.
static int code_cut(Codec *z, const Block *b, int piece, int most) {
    Coder *c = &z->coder;
    uint64_t unit = c->range / ((uint64_t)most + 1), cut = 0;
    if (c->decoding) cut = (c->code - c->low) / unit;
    for (int i = 0, best = 0; i <= most && !c->decoding; i++) {
        int lines = lines_before(z, b, piece - i);
        if (lines > 2) lines = 2;
        if (lines > best) best = lines, cut = (uint64_t)i;
    }
    if (cut > (uint64_t)most) cut = (uint64_t)most;
    narrow(c, cut, 1, unit);
    return (int)cut;
}

// Codes a block: if nothing is before it, its first pieces alone, as context for the others.
static void code_block(Codec *z, Block *b) {
    int head = z->tail.n > 1 ? 0 : b->n < prefix_of(z) ? b->n : prefix_of(z), n = b->n - head;
    if (head) code_span(z, &(Span){b, 1, {0, head}});
    if (!n) return;
    Span span = {b, b->segments, {head}};
    for (int s = 1; s <= span.n; s++) {
        span.first[s] = head + (int)((int64_t)n * s / span.n);
        if (s < span.n) span.first[s] -= code_cut(z, b, span.first[s], n / span.n / CUT);
    }
    code_span(z, &span);
}

static void add_piece(Block *b, int token, size_t start, size_t len) {
    Piece *last = b->n ? &b->pieces[b->n - 1] : NULL;
    if (!len) return;
    if (token < 0 && last && last->token < 0) last->len += (uint32_t)len;
    else b->pieces[b->n++] = (Piece){token, (uint32_t)start, (uint32_t)len};
}

// Cuts a text, whose place in the block is `start`, into tokens. Bytes that have none stay raw.
static void cut_text(const Tokenizer *t, Text text, size_t start, Block *b) {
    Tokenizer exact = *t;
    Ids ids = {0};
    char *typed = memset(resize(NULL, text.len, 1), 1, text.len);
    exact.h.flags &= ~(uint32_t)ADD_SPACE_PREFIX;
    encode(&exact, text, typed, false, &ids);
    size_t at = 0;
    for (size_t i = 0; i < ids.n; i++) {
        Text token = t->tokens[ids.ids[i]].text;
        for (size_t p = at; token.len && p + token.len <= text.len && p < at + 64; p++) {
            if (memcmp(text.s + p, token.s, token.len)) continue;
            add_piece(b, -1, start + at, p - at);
            add_piece(b, ids.ids[i], start + p, token.len);
            at = p + token.len;
            break;
        }
    }
    add_piece(b, -1, start + at, text.len - at);
    free(typed), free(ids.ids);
}

// Cuts a block's raw bytes into pieces: tokens where there is valid text of some length.
static void cut_block(const Tokenizer *t, Block *b) {
    const char *s = (const char *)b->raw;
    size_t n = b->n_bytes, used;
    b->n = 0;
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i; end < n; end += used) {
            uint32_t c = next_char(s + end, n - end, &used);
            if (c == 0xfffd && used == 1) break;
            if (c < 32 && c != '\t' && c != '\n' && c != '\r') break;
        }
        if (end - i >= 16 || end == n) cut_text(t, (Text){s + i, end - i}, i, b);
        else add_piece(b, -1, i, ++end - i);
    }
}

// ---- The file

static void file_header(const Codec *z, uint64_t header[3]) {
    const Model *m = z->m;
    const Tokenizer *t = z->t;
    header[0] = (uint64_t)z->context << 32 | MAGIC;
    header[1] = m->c.version == 3 ? m->c.content_hash : hash64(m->file, m->file_size);
    header[2] = t->llama2c ? hash64(t->file, t->file_size) : t->h.hash;
}

static void open_codec(Codec *z, const Model *m, const Tokenizer *t, bool quiet) {
    size_t vocab = (size_t)m->c.vocab_size, n_groups = (vocab + GROUP - 1) / GROUP;
    *z = (Codec){.m = m, .t = t, .block = BLOCK, .shortest = SHORTEST, .n_groups = (int)n_groups};
    z->start = t->h.bos >= 0 ? t->h.bos : t->h.eos >= 0 ? t->h.eos : 0;
    z->line_end = z->start;
    for (int i = 0; i < t->h.vocab_size; i++)
        if (t->tokens[i].text.len == 1 && *t->tokens[i].text.s == '\n') z->line_end = i;
    z->bias = resize(NULL, vocab, sizeof(float));
    z->squares = resize(NULL, vocab, sizeof(float));
    z->local = resize(NULL, (size_t)(z->local_capacity = 1 << 12), sizeof(LocalBias));
    z->all_lists = resize(NULL, ALL_LISTS, sizeof(List));
    z->p = resize(NULL, SEGMENTS * vocab, sizeof(float));
    z->sums = resize(NULL, SEGMENTS * n_groups, sizeof(uint32_t));
    z->progress = (Progress){.on = !quiet && isatty(2), .began = seconds()};
    forget(z);
}
static void set_context(Codec *z, int context) {
    z->context = context;
    int window = context - prefix_of(z), most = z->m->c.seq_len - prefix_of(z);
    new_cache(&z->kv, z->m, prefix_of(z), SEGMENTS,
              most - window > MAX_BATCH ? window + MAX_BATCH : most);
    z->kv.window = window;
}
static void free_codec(Codec *z) {
    void *all[] = {z->bias, z->squares, z->local, z->all_lists,
                   z->p,    z->sums,    z->tail.ids, z->coder.bytes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    if (z->context) free_cache(&z->kv);
}

// The checksum of a file up to a block's end, from that of what is before the block.
static uint64_t check_block(uint64_t before, const BlockHead *h, const uint8_t *coded) {
    return mix64(mix64(before + hash64(h, sizeof *h)) + hash64(coded, h->coded));
}

// Writes a compressed file, and returns its size.
static uint64_t shrink(Codec *z, Input *in, Output *out) {
    uint64_t header[3], check, written = sizeof header;
    file_header(z, header);
    write_output(out, header, sizeof header);
    check = hash64(header, sizeof header);
    Block b = {.raw = resize(NULL, z->block, 1), .pieces = resize(NULL, z->block, sizeof(Piece))};
    for (BlockHead h = {0}; !h.last;) {
        b.n_bytes = read_input(in, b.raw, z->block);
        z->block_part = in->size > 0 ? (double)b.n_bytes / in->size : NAN;
        cut_block(z->t, &b);
        b.segments = b.n / z->shortest + 1 < SEGMENTS ? b.n / z->shortest + 1 : SEGMENTS;
        start_coder(&z->coder, false, 0);
        code_block(z, &b);
        finish_coder(&z->coder);
        const uint8_t *coded = z->coder.bytes;
        if (z->coder.n >= b.n_bytes) {  // nothing that the model knows
            coded = b.raw, z->coder.n = b.n_bytes;
            forget(z);
        }
        h = (BlockHead){(uint32_t)b.n_bytes, (uint32_t)b.n, (uint32_t)z->coder.n,
                        (uint16_t)b.segments, b.n_bytes < z->block,
                        mix64(h.hash + hash64(b.raw, b.n_bytes))};
        check = check_block(check, &h, coded);
        write_output(out, &h, sizeof h);
        write_output(out, coded, h.coded);
        write_output(out, &check, sizeof check);
        written += sizeof h + h.coded + sizeof check;
        z->bytes += h.bytes;
        z->part += z->block_part;
    }
    free(b.raw), free(b.pieces);
    return written;
}

// Puts the text of a decoded block together in `text`; false: it has not the length that it should.
static bool join_block(const Tokenizer *t, const Block *b, char *text) {
    size_t used = 0;
    for (int i = 0; i < b->n; i++) {
        const Piece *p = &b->pieces[i];
        if (p->token >= t->h.vocab_size) return false;
        Text raw = {(char *)b->raw + p->start, p->len};
        Text x = p->token < 0 ? raw : t->tokens[p->token].text;
        if (x.len > b->n_bytes - used) return false;
        memcpy(text + used, x.s, x.len);
        used += x.len;
    }
    return used == b->n_bytes;
}

// Writes the text of a compressed file, block by block, and nothing without its checksum. Returns
// what is wrong with the file, or NULL.
static const char *expand(Codec *z, Input *in, Output *out) {
    uint64_t mine[3], header[3] = {0}, hash = 0, check, its_check;
    bool whole = read_input(in, header, sizeof header) == sizeof header;
    if ((uint32_t)header[0] != MAGIC)
        return (uint32_t)header[0] << 8 == (uint32_t)MAGIC << 8
                   ? "was compressed by another version of this program"
                   : "is not a file that -m compress wrote";
    if (!whole) return "is truncated or damaged";
    if (header[0] >> 32 < SHORTEST_CONTEXT || header[0] >> 32 > (uint64_t)z->m->c.seq_len)
        return "is damaged, or was compressed with another model";
    set_context(z, (int)(header[0] >> 32));
    file_header(z, mine);
    if (header[1] != mine[1]) return "was compressed with another model: -m decompress needs it";
    if (header[2] != mine[2]) return "was compressed with another tokenizer: give it with -z";
    check = hash64(header, sizeof header);
    Block b = {0};
    char *text = NULL;
    const char *wrong = NULL;
    for (BlockHead h = {0}; !h.last && !wrong;) {
        wrong = "is truncated or damaged";
        if (read_input(in, &h, sizeof h) < sizeof h || h.bytes > BLOCK || h.pieces > h.bytes ||
            !h.segments || h.segments > SEGMENTS || h.coded > h.bytes) break;
        z->coder.bytes = resize(z->coder.bytes, h.coded, 1);
        if (read_input(in, z->coder.bytes, h.coded) < h.coded) break;
        check = check_block(check, &h, z->coder.bytes);
        if (read_input(in, &its_check, 8) < 8 || check != its_check) break;
        z->block_part = in->size > 0 ? (double)h.coded / in->size : NAN;
        wrong = "does not give its text: this program computes other numbers; try -m check";
        text = resize(text, h.bytes, 1);
        if (h.coded == h.bytes) {
            memcpy(text, z->coder.bytes, h.bytes);
            forget(z);
        } else {
            b = (Block){resize(b.pieces, h.pieces, sizeof(Piece)), (int)h.pieces, h.segments,
                        resize(b.raw, h.bytes, 1), 0, h.bytes};
            memset(b.pieces, 0, h.pieces * sizeof(Piece));
            start_coder(&z->coder, true, h.coded);
            code_block(z, &b);
            if (!join_block(z->t, &b, text)) break;
        }
        hash = mix64(hash + hash64(text, h.bytes));
        if (hash != h.hash) break;
        wrong = NULL;
        write_output(out, text, h.bytes);
        z->bytes += h.bytes;
        z->part += z->block_part;
    }
    free(b.raw), free(b.pieces), free(text);
    if (!wrong && read_input(in, &its_check, 1)) wrong = "goes on after its end: it is damaged";
    return wrong;
}

// Both modes.
static void compress(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    bool back = !strcmp(o->mode, "decompress");
    Codec z;
    int context = context_of(o, m);
    if (!back && context < SHORTEST_CONTEXT)
        die("a context of %d is too short to compress with: -c %d is the least", context,
            SHORTEST_CONTEXT);
    open_codec(&z, m, t, o->quiet);
    if (!back) set_context(&z, o->context || context < USUAL_CONTEXT ? context : USUAL_CONTEXT);
    Input in = open_input(o);
    const char *wrong = NULL;
    double written = 0;
    if (back) wrong = expand(&z, &in, out);
    else written = (double)shrink(&z, &in, out);
    double took = seconds() - z.progress.began;
    end_progress(&z.progress);
    if (wrong) die("%s %s", in.name, wrong);
    if (!o->quiet && back) fprintf(stderr, "%.0f bytes, %.1f s\n", z.bytes, took);
    else if (!o->quiet)
        fprintf(stderr, "%.0f bytes -> %.0f bytes: %.4f bits per byte, %.1f s\n", z.bytes, written,
                8 * written / (z.bytes > 0 ? z.bytes : 1), took);
    close_input(&in);
    free_codec(&z);
}

// ---- check: a checkpoint certifies itself

// Compares the ids of the stored texts. Returns the number of texts.
static int check_tokenizer(const Model *m, const Tokenizer *t) {
    if (m->check_cases.cols < 4) return 0;
    const uint8_t *p = m->check_cases.data, *end = p + m->check_cases.cols;
    int n_cases = (int)read_u32(p);
    p += 4;
    for (int i = 0; i < n_cases; i++) {
        struct { uint32_t kind, len, n; } head = {.kind = 2};  // 0: a text, 1: a chat's first turn
        if (end - p >= 12) memcpy(&head, p, 12);
        uint64_t len = ((uint64_t)head.len + 3) / 4 * 4, bytes = 4 * (uint64_t)head.n;
        if (head.kind > 1 || len + bytes > (uint64_t)(end - p) - 12)
            die("check failed: the stored texts are damaged");
        Text text = {(const char *)p + 12, head.len};
        Prompt prompt = {0};
        Ids ids = {0};
        if (head.kind) append_turn(&prompt, t, true, (Text){NULL, 0}, text);
        else append(&prompt, text, false);
        encode(t, (Text){prompt.s, prompt.n}, prompt.typed, true, &ids);
        if (ids.n != head.n || (ids.n && memcmp(ids.ids, p + 12 + len, bytes)))
            die("check failed: tokenizer: text %d of the stored ones gives other tokens", i + 1);
        free(prompt.s);
        free(prompt.typed);
        free(ids.ids);
        p += 12 + len + bytes;
    }
    return n_cases;
}

typedef struct { const Model *m; float tolerance; double worst; } NormCheck;
static void check_norm(void *observer, const char *name, int layer, const float *x, int n,
                       int width) {
    NormCheck *check = observer;
    if (strcmp(name, "x")) return;  // only the residual stream has reference values
    double sum = 0, expected = (double)vec(&check->m->check_norms)[layer + 1];
    const float *last = x + (size_t)(n - 1) * (size_t)padded(width);
    for (int i = 0; i < width; i++) sum += (double)last[i] * (double)last[i];
    double error = fabs(sqrt(sum) - expected) / (expected + 1e-30);
    if (!(error <= (double)check->tolerance))
        die("check failed: layer %d: the residual has norm %g, the reference %g", layer, sqrt(sum),
            expected);
    check->worst = fmax(check->worst, error);
}

// How far logits are from the reference: root mean square, in units of the reference's spread.
static double logits_error(const float *logits, const float *expected, int n, double *worst) {
    double squares = 0, mean = 0, spread = 0;
    for (int i = 0; i < n; i++) mean += (double)expected[i] / n;
    for (int i = 0; i < n; i++) {
        double error = fabs((double)logits[i] - (double)expected[i]);
        *worst = error > *worst ? error : *worst;
        squares += error * error;
        spread += ((double)expected[i] - mean) * ((double)expected[i] - mean);
    }
    return sqrt(squares / n) / (sqrt(spread / n) + 1e-30);
}

// Hashes the file and compares with the header's hash.
static void check_content(const Options *o, const Model *m) {
    if (m->c.version != 3) die("%s is a file of llama2.c, which has no reference values to check; "
                               "export.py makes a version 3 of it that has", m->path);
    uint64_t sum = file_hash(m, m->file_size);
    if (sum != m->c.content_hash)
        die("check failed: content: %s has hash %016llx, its header says %016llx: the file is "
            "damaged", m->path, (unsigned long long)sum, (unsigned long long)m->c.content_hash);
    if (!o->quiet) fprintf(stderr, "content: %zu bytes, hash %016llx\n", m->file_size,
                           (unsigned long long)sum);
}

// Runs the stored tokens: the residual stream's norms and the last logits must be near the
// reference, and the plain functions of part 1 must give the very bits of the fast ones of part 3.
static void check_layers(const Options *o, const Model *m) {
    int n = m->check_ids.cols / 4, vocab = m->c.vocab_size;
    if (n > MAX_BATCH || n > m->c.seq_len) die("check failed: %d stored tokens", n);
    if (!n) return;
    Slot batch[MAX_BATCH];
    for (int i = 0; i < n; i++) {
        batch[i] = (Slot){(int)read_u32(m->check_ids.data + 4 * i), i, 0, i == n - 1};
        if (batch[i].token < 0 || batch[i].token >= vocab)
            die("check failed: stored token %d", i);
    }
    bool quantized = m->layers[0].wq.dtype >= Q8;
    NormCheck norms = {.m = m, .tolerance = quantized ? 2e-2f : 2e-3f};
    Cache fast, plain;
    new_cache(&fast, m, n, 0, 0);
    fast.observe = check_norm;
    fast.observer = &norms;
    const float *logits = forward(m, &fast, batch, n);
    double worst = 0, error = logits_error(logits, vec(&m->check_logits), vocab, &worst);
    if (!(error <= (quantized ? 0.3 : 2e-3)))
        die("check failed: logits: they differ from the reference by %.2g%% (%g at most)",
            error * 100, worst);
    if (!o->quiet)
        fprintf(stderr, "layers: norms within %.1e, logits within %.1e of the reference\n",
                norms.worst, error);
    new_cache(&plain, m, n, 0, 0);
    plain.plain = true;
    if (memcmp(logits, forward(m, &plain, batch, n), (size_t)vocab * sizeof(float)))
        die("check failed: this binary's %s code differs from plain C: the compiler may be at "
            "fault",
            isa);
    if (!o->quiet) fprintf(stderr, "%s: the same bits as plain C\n", isa);
    free_cache(&fast);
    free_cache(&plain);
}

static void check_model(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    check_content(o, m);
    int n_texts = t->file ? check_tokenizer(m, t) : 0;
    if (t->file && !o->quiet) fprintf(stderr, "tokenizer: %s, %d texts\n", t->path, n_texts);
    check_layers(o, m);
    write_output(out, "ok\n", 3);
}

// ---- bench: how fast this machine runs the model, beside how fast it could

// What the memory gives: all threads read a buffer that is larger than any cache, each its own
// share. Several shapes are tried: one stream or four per thread, with and without prefetching.
enum { STREAM_BYTES = 256 << 20, STREAM_AHEAD = 4096 };
typedef struct { const uint8_t *data; int n_threads, streams; bool ahead; } Stream;
static _Atomic uint64_t stream_sum;
static void stream_task(void *context, int item) {
    const Stream *s = context;
    size_t share = STREAM_BYTES / (size_t)s->n_threads / 64 * 64,
           part = share / (size_t)s->streams / 256 * 256;
    const uint8_t *p = s->data + (size_t)item * share;
    uint64_t sums[32] = {0};
    for (size_t i = 0; i < part; i += 256)
        for (int k = 0; k < s->streams; k++) {
            const uint64_t *q = (const uint64_t *)(const void *)(p + (size_t)k * part + i);
            for (int j = 0; j < 256 && s->ahead; j += 64)
                __builtin_prefetch((const char *)q + j + STREAM_AHEAD, 0, 2);
            for (int j = 0; j < 32; j++) sums[j] += q[j];
        }
    for (int j = 1; j < 32; j++) sums[0] += sums[j];
    atomic_fetch_add(&stream_sum, sums[0]);
}

// The next three measure once: bytes, or tokens, per second.
static double stream_rate(Stream *s) {
    double best = 0;
    for (int shape = 0; shape < 4; shape++) {
        s->streams = shape & 1 ? 4 : 1;
        s->ahead = shape & 2;
        double start = seconds();
        parallel(stream_task, s, s->n_threads);
        best = fmax(best, STREAM_BYTES / (seconds() - start));
    }
    return best;
}

// Tokens ids[from..to), `step` at a time.
static double token_rate(const Model *m, Cache *kv, const int *ids, int from, int to, int step) {
    double start = seconds();
    for (int i = from; i < to; i += step) prefill(m, kv, 0, ids, i, i + step);
    return (to - from) / (seconds() - start);
}

// n tokens of each of 16 texts that share their first positions.
static double batch_rate(const Model *m, Cache *kv, const int *ids, int shared, int n) {
    Slot batch[16];
    double start = seconds();
    for (int s = 1; s < 16; s++) kv->from[s] = shared;
    for (int i = 0; i < n; i++) {
        for (int s = 0; s < 16; s++)
            batch[s] = (Slot){ids[(i * 16 + s) % shared], shared + i, s, true};
        forward(m, kv, batch, 16);
    }
    return 16 * n / (seconds() - start);
}

static double median(const double x[3]) {
    return fmax(fmin(x[0], x[1]), fmin(fmax(x[0], x[1]), x[2]));
}

// The bytes that a token reads: all matrices but the embedding, if that is not the classifier too.
static size_t bytes_read(const Model *m) {
    size_t bytes = matrix_bytes(m->classifier.dtype, m->c.vocab_size, m->c.dim);
    for (int l = 0; l < m->c.n_layers; l++)
        for (size_t i = 0; i < sizeof(Layer) / sizeof(Matrix); i++) {  // that is all it has
            const Matrix *w = (const Matrix *)(const void *)&m->layers[l] + i;
            bytes += w->data ? matrix_bytes(w->dtype, w->rows, w->cols) : 0;
        }
    return bytes;
}

// Says why decoding is far from what the memory allows, or above it.
static void print_verdict(double decode, double limit, int threads) {
    const char *build = NULL;
    double load = 0;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
#ifndef __OPTIMIZE__
    build = "without optimisation (-O3)";
#elif defined PLAIN
    build = "with -DPLAIN, without SIMD and threads";
#endif
    if (decode > limit)
        fprintf(stderr, "verdict: above the memory's limit: the model lies in the caches\n");
    if (decode >= 0.8 * limit) return;
    if (build) fprintf(stderr, "verdict: far from the limit: built %s\n", build);
    else if (threads > cores)
        fprintf(stderr, "verdict: far from the limit: %d threads on %ld cores\n", threads, cores);
    else if (getloadavg(&load, 1) == 1 && load > (double)cores - threads + 1.3 * threads)
        fprintf(stderr, "verdict: far from the limit: other programs use the cores (load %.1f)\n",
                load);
    else
        fprintf(stderr, "verdict: %.0f%% of the limit: the model is small beside its fixed costs, "
                        "or the kernels for %s are slower than the memory\n",
                100 * decode / limit, isa);
}

static void bench(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    int ctx = context_of(o, m), threads = (int)o->threads;
    int n = ctx < 512 ? ctx : 512, first = (n + 63) / 64;  // tokens of a prompt, and of its start
    int depth = ctx < 4096 + 64 ? ctx - ctx / 16 : 4096,
        end = ctx < depth + 32 ? ctx : depth + 32;
    (void)t;
    int *ids = resize(NULL, (size_t)ctx, sizeof *ids);
    for (int i = 0; i < ctx; i++) ids[i] = (int)(i * 7919LL % 30000 + 5) % m->c.vocab_size;
    Cache kv;
    new_cache(&kv, m, ctx, 15, n / 16);
    prefill(m, &kv, 0, ids, 0, first);
    double startup = seconds() - o->started;
    size_t bytes = STREAM_BYTES + 2 * STREAM_AHEAD;
    Stream stream = {reserve(1, bytes, "measuring the memory"), threads, 1, false};
    large_pages(stream.data, bytes);
    memset((void *)(uintptr_t)stream.data, 1, bytes);
    double memory[3] = {0}, decode[3] = {0}, prompt[3] = {0}, batch[3] = {0};
    double *all[] = {memory, decode, prompt, batch}, start = seconds();
    for (int i = 0; i < 3; i++) {
        if (i == 2 && seconds() - start > 6) {  // the mean of two must do
            for (int j = 0; j < 4; j++) all[j][2] = (all[j][0] + all[j][1]) / 2;
            break;
        }
        memory[i] = stream_rate(&stream);
        prefill(m, &kv, 0, ids, 0, first);
        decode[i] = token_rate(m, &kv, ids, first, first + n / 4, 1);
        prompt[i] = token_rate(m, &kv, ids, 0, n, n);
        batch[i] = batch_rate(m, &kv, ids, n / 4, n / 16);
    }
    double deep_prompt = token_rate(m, &kv, ids, 0, depth, depth);
    double deep_decode = token_rate(m, &kv, ids, depth, end, 1);
    double read = (double)bytes_read(m), limit = median(memory) / read;
    char report[5000];  // a path is at most 4096 bytes long
    int length = snprintf(
        report, sizeof report,
        "model: %s\ndtype: %s\nisa: %s\nthreads: %d\nweights_mb: %.1f\nstream_gb_s: %.1f\n"
        "prefill_tok_s: %.1f\nprefill4096_tok_s: %.1f\ndecode_tok_s: %.1f\n"
        "decode_limit_tok_s: %.1f\ndecode_of_limit: %.2f\ndecode_depth4096_tok_s: %.1f\n"
        "batch16_tok_s: %.1f\nstartup_ms: %.1f\n",
        m->c.name[0] ? m->c.name : m->path, dtype_names[m->layers[0].wq.dtype], isa, threads,
        read / 1e6, median(memory) / 1e9, median(prompt), deep_prompt, median(decode), limit,
        median(decode) / limit, deep_decode, median(batch), startup * 1000);
    write_output(out, report, (size_t)length);
    if (depth != 4096 && !o->quiet)
        fprintf(stderr, "the context is short: depth4096 is depth %d here\n", depth);
    if (!o->quiet) print_verdict(median(decode), limit, threads);
    munmap((void *)(uintptr_t)stream.data, bytes);
    free(ids);
    free_cache(&kv);
}

// =================================================================================================
// Part 5. The command line
// =================================================================================================
#ifndef TESTING

// One table parses, checks and explains the options.
enum { FLAG, TEXT, WORD, LIST, INTEGER, NUMBER_OPTION, SEED };
typedef struct {
    char letter;       // or 0
    const char *name;  // and behind it its argument
    int kind;
    size_t field;      // where in Options its value goes
    double low, high;  // of a number
    const char *help;
} Option;

#define TO(field) offsetof(Options, field)
static const Option options[] = {
    {'i', "prompt TEXT", TEXT, TO(prompt), 0, 0, "the prompt; - reads it from stdin"},
    {'f', "file PATH", WORD, TO(prompt_file), 0, 0, "read the prompt from a file; - is stdin"},
    {'o', "output PATH", WORD, TO(output), 0, 0, "write there instead of to stdout"},
    {'n', "steps N", INTEGER, TO(steps), 0, 1e9,
     "new tokens (256; in a chat 1024 a turn); 0: to the context's end"},
    {'m', "mode MODE", WORD, TO(mode), 0, 0, "what to do, see below"},
    {'t', "temperature T", NUMBER_OPTION, TO(temperature), 0, 1e30,
     "0: the likeliest token; 1 (default): as the model says"},
    {'p', "top-p P", NUMBER_OPTION, TO(top_p), 0, 1,
     "draw from the likeliest tokens with this sum (0.9); 0 or 1: from all"},
    {'s', "seed N", SEED, TO(seed), 0, 0, "of the random generator; 0 (default): from the clock"},
    {'z', "tokenizer PATH", WORD, TO(tokenizer), 0, 0,
     "the tokenizer (MODEL's .tok, or tokenizer.bin)"},
    {'c', "context N", INTEGER, TO(context), 0, 1 << 24,
     "positions to make room for (the model's own)"},
    {'j', "threads N", INTEGER, TO(threads), 1, 256, "threads (the number of cores)"},
    {'y', "system TEXT", TEXT, TO(system), 0, 0, "the system turn of a chat"},
    {'k', "samples N", INTEGER, TO(samples), 1, MAX_SAMPLES,
     "N continuations at once, each with a seed of its own"},
    {'b', "best", FLAG, TO(best), 0, 0, "of these only the likeliest"},
    {'e', "ensemble MODEL", LIST, TO(others), 0, 0,
     "this model answers too, the best answer wins; repeatable"},
    {'d', "draft MODEL", WORD, TO(draft), 0, 0,
     "speculate with a small model, or \"lookup\": in the text so far"},
    {'S', "session FILE", WORD, TO(session), 0, 0,
     "keep the text in FILE with its cache; go on with what it holds"},
    {'T', "tool CMD", WORD, TO(tool), 0, 0,
     "answers arithmetic (12*34=) and tool calls on its stdin"},
    {0, "think", FLAG, TO(think), 0, 0, "keep <think> ... </think> where stdout is no terminal"},
    {'q', "quiet", FLAG, TO(quiet), 0, 0, "no statistics and no progress on stderr"},
    {0, "top-k K", INTEGER, TO(top_k), 0, 1 << 24, "draw from the K likeliest tokens"},
    {0, "min-p P", NUMBER_OPTION, TO(min_p), 0, 1,
     "from those at least P times as likely as the likeliest"},
    {0, "repeat-penalty R", NUMBER_OPTION, TO(repeat_penalty), 1e-3, 1e3,
     "makes tokens of the text less likely; 1 is off"},
    {0, "receipt", FLAG, TO(receipt), 0, 0, "print a hash of all logits that were sampled from"},
    {0, "layer L", INTEGER, TO(layer), 0, MAX_LAYERS - 1,
     "explain: attention of this layer, from 0 (the mean of all)"},
    {0, "head H", INTEGER, TO(head), 0, 1 << 14,
     "explain: ... and of this head of it, from 0 (the mean)"},
    {0, "trace", FLAG, TO(trace), 0, 0, "explain: each stage of the computation in numbers"},
    {'h', "help", FLAG, TO(help), 0, 0, "this text"},
    {'V', "version", FLAG, TO(version), 0, 0, "version and instruction set"},
};
#undef TO
enum { N_OPTIONS = sizeof options / sizeof *options };

static __attribute__((noreturn, format(printf, 1, 2))) void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputs("; see ./run --help\n", stderr);
    va_end(args);
    exit(2);
}

// The option that an argument names: as -x, --name or --name=value.
static const Option *find_option(const char *a) {
    size_t n = a[1] == '-' ? strcspn(a + 2, "=") : 0;
    for (const Option *option = options; option < options + N_OPTIONS; option++) {
        if (a[1] == option->letter && !a[2]) return option;
        if (n && n == strcspn(option->name, " ") && !strncmp(a + 2, option->name, n)) return option;
    }
    usage_error("unknown option %s", a);
}

static void set_option(Options *o, const Option *option, const char *a, const char *s) {
    void *field = (char *)o + option->field;
    char *end = (char *)(uintptr_t)s;
    double number = 0;
    errno = 0;
    if (option->kind == FLAG) *(bool *)field = true;
    if (option->kind == TEXT || option->kind == WORD) *(const char **)field = s;
    if (option->kind == LIST) {
        if (o->n_others == MAX_OTHERS) usage_error("%s is given too often", a);
        ((const char **)field)[o->n_others++] = s;
    }
    if (option->kind < INTEGER) return;
    if (option->kind == INTEGER) number = (double)(*(long long *)field = strtoll(s, &end, 10));
    if (option->kind == NUMBER_OPTION) number = *(double *)field = strtod(s, &end);
    if (option->kind == SEED) *(unsigned long long *)field = strtoull(s, &end, 10);
    if (end == s || *end || (s[0] >= '\t' && s[0] <= ' '))
        usage_error("%s needs a number, not \"%s\"", a, s);
    if (option->kind == SEED && (strchr(s, '-') || errno))
        usage_error("%s goes from 0 to 18446744073709551615, not %s", a, s);
    if (!(number >= option->low && number <= option->high))
        usage_error("%s goes from %.10g to %.10g, not %.40s", a, option->low, option->high, s);
}

static void parse(Options *o, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *equals = strchr(a, '='), *value = equals ? equals + 1 : NULL;
        if (a[0] != '-' || !a[1]) {
            if (o->model) usage_error("there are two models, %s and %s", o->model, a);
            o->model = a;
            continue;
        }
        const Option *option = find_option(a);
        bool flag = option->kind == FLAG;
        if (flag && value) usage_error("%s takes no value", a);
        if (!flag && !value) value = argv[++i];
        if (!flag && (!value || (!*value && option->kind != TEXT)))
            usage_error("%s needs a value", a);
        set_option(o, option, a, value);
    }
}

// An output that is also an input would be lost: it is refused.
static void refuse_overwriting(const char *output, const char *input) {
    if (same_file(output, input))
        usage_error("-o %s would overwrite %s, which is read", output, input);
}

// generate and chat.
static void generate_or_chat(const Options *o, const Model *m, const Tokenizer *t, Output *out) {
    bool chats = !strcmp(o->mode, "chat");
    Text prompt = {NULL, 0};
    if (!chats || o->prompt || o->prompt_file) prompt = input_text(o);
    if (chats) chat(o, m, t, prompt, out);
    else if (o->n_others) ensemble(o, m, t, prompt, out);
    else generate(o, m, t, prompt, out);
    free((char *)(uintptr_t)prompt.s);
}

enum { GENERATE, CHAT, TOKENIZE, LOGITS, EVAL, EXPLAIN, COMPRESS, DECOMPRESS, CHECK, BENCH,
       N_MODES };
typedef void Mode(const Options *o, const Model *m, const Tokenizer *t, Output *out);
static const struct { const char *name; Mode *run; const char *help; } modes[N_MODES] = {
    {"generate", generate_or_chat, "continue the prompt (the default)"},
    {"chat", generate_or_chat, "a conversation: -i or -f is the first turn, then lines of stdin"},
    {"tokenize", tokenize, "print the prompt's token ids"},
    {"logits", write_logits, "read token ids, write their logits as raw float32 [n, vocab_size]"},
    {"eval", evaluate, "bits per byte of a text, by windows of -c tokens (2048) that start every\n"
     "             half window; each token is predicted in the first window that holds it"},
    {"explain", explain, "generate, and show for each token its rivals, what it looks at and what\n"
     "             each layer would say; with -o page.html as a page to explore"},
    {"compress", compress, "write the text of -f, -i or stdin in few bytes: the model predicts it, "
     "and\n             only what surprises the model is kept; any other data works too"},
    {"decompress", compress, "give that text back; it needs the same model and tokenizer"},
    {"check", check_model, "recompute the reference values stored in the model"},
    {"bench", bench, "measure this machine's speed with the model"},
};

// Returns the mode. Options that have no meaning in it, or together, are refused.
static int check_options(const Options *o) {
    int mode = 0;
    while (mode < N_MODES && strcmp(o->mode, modes[mode].name)) mode++;
    if (mode == N_MODES) usage_error("unknown mode %s", o->mode);
    enum { TALK = 1 << GENERATE | 1 << CHAT, SHOW = 1 << EXPLAIN };
    bool k = o->samples > 1, e = o->n_others, d = o->draft, s = o->session, layer = o->layer >= 0;
    struct { bool given; const char *name; int modes; } uses[] = {
        {o->samples, "-k", TALK}, {o->best, "-b", TALK}, {e, "-e", 1 << GENERATE}, {d, "-d", TALK},
        {s, "-S", TALK | 1 << LOGITS}, {o->tool, "-T", TALK}, {o->system, "-y", 1 << CHAT},
        {o->think, "--think", TALK}, {o->receipt, "--receipt", TALK}, {o->trace, "--trace", SHOW},
        {layer, "--layer", SHOW}, {o->head >= 0, "--head", SHOW},
        {o->steps >= 0, "-n", TALK | SHOW}, {o->temperature >= 0, "-t", TALK | SHOW},
        {o->top_p >= 0, "-p", TALK | SHOW}};
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        if (uses[i].given && !(uses[i].modes >> mode & 1))
            usage_error("%s means nothing in mode %s", uses[i].name, o->mode);
    struct { bool both; const char *a, *b; } clashes[] = {
        {o->prompt && o->prompt_file, "-i", "-f"}, {k && e, "-k", "-e"}, {k && d, "-k", "-d"},
        {e && d, "-e", "-d"}, {e && s, "-e", "-S"}, {e && o->receipt, "-e", "--receipt"},
        {layer && o->output && !o->trace, "--layer", "a page (-o), which shows all,"}};
    for (size_t i = 0; i < sizeof clashes / sizeof *clashes; i++)
        if (clashes[i].both)
            usage_error("%s and %s cannot be used together", clashes[i].a, clashes[i].b);
    if (o->best && !k) usage_error("-b picks the best of several samples: it needs -k");
    if (k && mode == CHAT && !o->best) usage_error("-k in a chat needs -b");
    if (o->head >= 0 && !layer) usage_error("--head needs --layer");
    if ((mode == COMPRESS || mode == LOGITS) && !o->output && isatty(1))
        usage_error("mode %s writes no text for a terminal: use -o or a pipe", o->mode);
    const char *inputs[] = {o->model, o->tokenizer, o->prompt_file, o->session, o->draft,
                            "/dev/stdin"};
    for (int i = 0; i < 6; i++) refuse_overwriting(o->output, inputs[i]);
    for (int i = 0; i < o->n_others; i++) refuse_overwriting(o->output, o->others[i]);
    return mode;
}

static void help(void) {
    puts("usage: ./run MODEL [options]\n\nRuns a language model: continues a text, or what --mode "
         "says.\n");
    for (int i = 0; i < N_OPTIONS; i++) {
        char letter[] = {'-', options[i].letter, ',', ' ', 0}, left[64];
        snprintf(left, sizeof left, "%s--%s", letter[1] ? letter : "    ", options[i].name);
        printf("  %-26s %s\n", left, options[i].help);
    }
    puts("\nmodes:");
    for (int i = 0; i < N_MODES; i++) printf("  %-10s %s\n", modes[i].name, modes[i].help);
    puts("\nexit status: 0 done, 1 something went wrong, 2 wrong command line, 130 stopped");
}

static void on_interrupt(int signal_number) {
    if (interrupted || idle) {
        remove_unfinished();
        _exit(interrupted ? 128 + signal_number : 130);
    }
    interrupted = signal_number == SIGHUP ? SIGTERM : signal_number;
}
static void on_bus_error(int signal_number) {
    static const char line[] =
        "run: a mapped file has become shorter, or cannot be read any more\n";
    (void)signal_number;
    if (write(2, line, sizeof line - 1) < 0) {}
    remove_unfinished();
    _exit(1);
}

// A binary built for another machine's instructions says so instead of dying of an illegal one. It
// runs before anything else, and is itself compiled for the oldest machine.
#if defined __x86_64__ && !defined PLAIN
__attribute__((constructor, target("arch=x86-64"))) static void check_cpu(void) {
    const char *missing = NULL;
    __builtin_cpu_init();
#define VALUE_OF(macro) #macro  // of one that is not defined this is its name
#define NEED(macro, feature)                                                                       \
    if (*VALUE_OF(macro) == '1' && !__builtin_cpu_supports(feature)) missing = feature
    NEED(__AVX__, "avx");
    NEED(__AVX2__, "avx2");
    NEED(__FMA__, "fma");
    NEED(__BMI2__, "bmi2");
    NEED(__AVX512F__, "avx512f");
    NEED(__AVX512BW__, "avx512bw");
    NEED(__AVX512VL__, "avx512vl");
    NEED(__AVX512DQ__, "avx512dq");
    NEED(__AVX512VNNI__, "avx512vnni");
    NEED(__AVX512VBMI__, "avx512vbmi");
#undef NEED
#undef VALUE_OF
    if (!missing) return;
    fprintf(stderr,
            "run: this binary needs %s, which this processor does not have: build it here with "
            "`make`, or with `make ARCH=x86-64`\n",
            missing);
    _exit(1);
}
#endif

// The contract of equal bits needs these; a wrong build says so instead of breaking it.
static void check_arithmetic(void) {
    volatile float a = 1 + 0x1p-12f, square = 1 + 0x1p-11f, tiny = FLT_MIN;
    if (a * a - square != 0) die("built with fused multiply-add: use -ffp-contract=off");
    if (tiny / 2 == 0) die("built to flush subnormal numbers to zero: do not use -ffast-math");
}

// A file that we open must not become stdin, stdout or stderr: a closed one gets a substitute that
// cannot be read or written.
static void fill_standard_files(void) {
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
}

static void catch_signals(void) {
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);  // a file that must not grow is an error of write
    signal(SIGBUS, on_bus_error);
    struct sigaction action = {.sa_handler = on_interrupt};  // without SA_RESTART: a read ends
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    if (signal(SIGHUP, SIG_IGN) != SIG_IGN) sigaction(SIGHUP, &action, NULL);  // but under nohup
    atexit(remove_unfinished);
}

int main(int argc, char **argv) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    Options o = {.mode = "generate", .steps = -1, .temperature = -1, .top_p = -1,
                 .repeat_penalty = 1, .layer = -1, .head = -1, .started = seconds(),
                 .threads = cores < 1 ? 1 : cores > 256 ? 256 : cores};
    fill_standard_files();
    check_arithmetic();
    parse(&o, argc, argv);
    if (o.help) help();
    else if (o.version) printf("run %s (%s)\n", VERSION, isa);
    if (o.help || o.version) {
        if (fflush(stdout)) die("cannot write stdout: %s", strerror(errno));
        return 0;
    }
    if (!o.model || !*o.model) usage_error("no model is named; `make demo` fetches model.bin");
    int mode = check_options(&o);
    if (o.steps < 0) o.steps = mode == CHAT ? 1024 : 256;
    catch_signals();
    start_threads((int)o.threads);
    Model m;
    Tokenizer t = {0};
    load_model(&m, o.model);
    if (mode != LOGITS && mode != BENCH && (mode != CHECK || m.c.tokenizer_hash))
        find_tokenizer(&t, o.tokenizer, &m);
    refuse_overwriting(o.output, t.path);
    Output out = open_output(o.output);
    idle = mode == CHECK || mode == BENCH;
    modes[mode].run(&o, &m, &t, &out);
    bool whole = !interrupted || (mode != LOGITS && mode != EVAL && !o.n_others);
    if (whole) close_output(&out);  // else there is none
    free_tokenizer(&t);
    free_model(&m);
    return interrupted ? 130 : 0;
}
#endif

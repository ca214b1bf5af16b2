/* test_all.c - the tests of run.c, which is included here with its main under another name.
 *
 *     make test             builds and runs everything
 *     ./test_all NAME       runs the groups whose name contains NAME
 *     ./test_all --tiny DIR writes a small random model to DIR: tiny.bin and tiny.tok
 *     HASHES=1 ./test_all   prints the hashes that every build must give as run.c gives them now
 *
 * Every block of run.c is held against a second definition of the same thing, written here from
 * the description and in double precision; then the whole model against a second transformer. What
 * the program does is tested with command lines, in tables: "these two print the same bytes", "this
 * one is refused, and its line says that". Models and tokenizers are made here, small and random,
 * in a temporary folder, the working directory. What needs ./run (RUN is another), model.bin,
 * .venv, ../shared or MODELS=folder says so without it.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
// What is replaced in run.c follows its headers.
#ifdef FUZZ  // exits come back to the fuzzer: see the end of this file
static __attribute__((noreturn)) void fuzz_exit(int status);
static void *fuzz_own(void *p, size_t mapped);
static void *fuzz_disown(void *p);
#define exit fuzz_exit
#define mmap(at, n, ...) fuzz_own(mmap(at, n, __VA_ARGS__), n)
#define munmap(p, n) munmap(fuzz_disown(p), n)
#define malloc(n) fuzz_own(malloc(n), 0)
#define realloc(p, n) fuzz_own(realloc(fuzz_disown(p), n), 0)
#define posix_memalign(p, align, n) (posix_memalign(p, align, n) || !fuzz_own(*(p), 0))
#define free(p) free(fuzz_disown(p))  // in the tests, too, which free what run.c returns
#define atexit(function) ((void)(function))
#endif
#ifdef FAULTS
// The program itself; FAULT=name:n makes the nth call of a function fail, or, with FAULT_SIGNALS,
// two signals come just before it.
static int fault(const char *name, int error) {
    static int left;
    const char *wanted = getenv("FAULT"), *colon = wanted ? strchr(wanted, ':') : NULL;
    if (!colon || strlen(name) != (size_t)(colon - wanted) || strncmp(wanted, name, strlen(name)))
        return 0;
    if (!left) left = atoi(colon + 1) + 1;
    if (left == 1 || --left != 1) return 0;
    if (getenv("FAULT_SIGNALS")) return kill(getpid(), SIGINT), kill(getpid(), SIGTERM), 0;
    errno = error;
    return error;
}
#define malloc(...) (fault("malloc", ENOMEM) ? NULL : malloc(__VA_ARGS__))
#define realloc(...) (fault("realloc", ENOMEM) ? NULL : realloc(__VA_ARGS__))
#define posix_memalign(...) (fault("posix_memalign", ENOMEM) ? ENOMEM : posix_memalign(__VA_ARGS__))
#define mmap(...) (fault("mmap", ENOMEM) ? MAP_FAILED : mmap(__VA_ARGS__))
#define open(...) (fault("open", EMFILE) ? -1 : open(__VA_ARGS__))
#define fstat(...) (fault("fstat", EIO) ? -1 : fstat(__VA_ARGS__))
#define read(...) (fault("read", EIO) ? -1 : read(__VA_ARGS__))
#define pread(...) (fault("pread", EIO) ? -1 : pread(__VA_ARGS__))
#define write(...) (fault("write", ENOSPC) ? -1 : write(__VA_ARGS__))
#define fsync(...) (fault("fsync", EIO) ? -1 : fsync(__VA_ARGS__))
#define rename(...) (fault("rename", EACCES) ? -1 : rename(__VA_ARGS__))
#define fcntl(...) (fault("fcntl", ENOLCK) ? -1 : fcntl(__VA_ARGS__))
#define fork() (fault("fork", EAGAIN) ? -1 : fork())
#define tmpfile() (fault("tmpfile", EMFILE) ? NULL : tmpfile())
#define pthread_create(...) (fault("pthread_create", EAGAIN) ? EAGAIN : pthread_create(__VA_ARGS__))
#define getline(...) (fault("getline", EIO) ? -1 : getline(__VA_ARGS__))
#define open_memstream(...) (fault("open_memstream", ENOMEM) ? NULL : open_memstream(__VA_ARGS__))
#include "run.c"
#else  // the rest of the file is the tests
#define main run_main
#include "run.c"
#undef main
#undef exit
#undef mmap
#undef munmap
#undef malloc
#undef realloc
#undef posix_memalign
#undef atexit

// ==== Counting, memory, files ====================================================================

static int passed, failed, skipped;
static const char *skips[16];  // why, and which command would run what was skipped
static int n_skips;
static bool finished;
static const char *group = "";

// Seconds after which something hangs; under a tool that slows it down, PATIENCE times as many.
static unsigned patience(unsigned seconds_) {
    return seconds_ * (getenv("PATIENCE") ? (unsigned)atoi(getenv("PATIENCE")) : 1);
}

// Counts one check. The sentence says what is true when it passes; values follow when it fails.
#define CHECK(ok, ...) check_(ok, __LINE__, __VA_ARGS__)
static __attribute__((format(printf, 3, 4))) bool check_(bool ok, int line, const char *format,
                                                         ...) {
    if (ok) return passed++, true;
    va_list args;
    va_start(args, format);
    if (failed++ < 200) {
        printf("test_all.c:%d: FAILED in %s: ", line, group);
        vprintf(format, args);
        putchar('\n');
        fflush(stdout);
    }
    va_end(args);
    return false;
}
static void skip(int n, const char *why) {
    if (n_skips < 16) skips[n_skips++] = why;
    skipped += n;
}

// Random numbers of the tests (splitmix64), always the same ones.
static uint64_t random_state = 1;
static uint64_t rnd(void) {
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}
static int below(int n) { return (int)(rnd() % (uint64_t)n); }
static double uniform(void) { return (double)(rnd() >> 11) * 0x1p-53; }             // [0, 1)
static double spread(void) { return 2 * (uniform() + uniform() + uniform()) - 3; }  // variance 1
static double worse(double a, double b) { return !(b <= a) ? b : a; }  // keeps a NaN

// Memory that is given back when the group ends.
static void **held;
static size_t n_held;
static void *own(void *p) {
    if (!(n_held & (n_held - 1))) held = realloc(held, (2 * n_held + 1) * sizeof *held);
    if (!p || !held) abort();
    return held[n_held++] = p;
}
static void *get(size_t n, size_t size) { return own(calloc(n + !n, size)); }
static void empty_pool(void) { while (n_held) free(held[--n_held]); }
// A text of the pool, made by printf.
static __attribute__((format(printf, 1, 2))) char *text(const char *format, ...) {
    char *s;
    va_list args;
    va_start(args, format);
    if (vasprintf(&s, format, args) < 0) abort();
    va_end(args);
    return own(s);
}

// Bytes that grow. A zero byte follows them.
typedef struct { uint8_t *p; size_t n, room; } Buffer;
static void put(Buffer *b, const void *data, size_t n) {
    if (b->n + n >= b->room) {
        uint8_t *more = get(b->room = (b->n + n + 1) * 2, 1);
        if (b->n) memcpy(more, b->p, b->n);
        b->p = more;
    }
    if (data && n) memcpy(b->p + b->n, data, n);
    else memset(b->p + b->n, 0, n);
    b->p[b->n += n] = 0;
}
static void put32(Buffer *b, int64_t value) { put(b, &(uint32_t){(uint32_t)value}, 4); }
static void put_text(Buffer *b, const char *s) { put(b, s, strlen(s)); }
static void align(Buffer *b, size_t to) { if (b->n % to) put(b, NULL, to - b->n % to); }
static void set32(uint8_t *p, int64_t value) { memcpy(p, &(uint32_t){(uint32_t)value}, 4); }
static void set64(uint8_t *p, uint64_t value) { memcpy(p, &value, 8); }
static void set_float(uint8_t *p, float value) { memcpy(p, &value, 4); }
static uint64_t get64(const uint8_t *p) { uint64_t u; memcpy(&u, p, 8); return u; }
static Buffer bytes_of(const void *data, size_t n) { Buffer b = {0}; put(&b, data, n); return b; }
static Buffer copy(const Buffer *b) { return bytes_of(b->p, b->n); }
static bool equal(const Buffer *a, const Buffer *b) {
    return a->n == b->n && !memcmp(a->p, b->p, a->n);
}
static bool is_text(const Buffer *b, const char *s) {
    return b->n == strlen(s) && !memcmp(b->p, s, b->n);
}
static int count(const Buffer *b, const char *what) {
    int n = 0;
    for (const char *p = (char *)b->p; (p = strstr(p, what)) != NULL; p++) n++;
    return n;
}

// ---- Files. The temporary folder is the working directory; home is where the tests were started.

static char folder[256], home[1000];
static const char *at_home(const char *path) { return text("%s/%s", home, path); }
static const char *save(const char *name, const void *data, size_t n) {
    unlink(name);
    FILE *f = fopen(name, "wb");
    if (!f || (n && fwrite(data, 1, n, f) != n) || fclose(f)) perror(name), abort();
    return name;
}
static const char *keep(const char *name, const Buffer *b) { return save(name, b->p, b->n); }
static Buffer slurp(const char *path) {
    Buffer b = bytes_of("", 0);
    FILE *f = fopen(path, "rb");
    char part[65536];
    for (size_t n; f && (n = fread(part, 1, sizeof part, f)) > 0;) put(&b, part, n);
    if (f) fclose(f);
    return b;
}
static int files_here(void) {
    DIR *d = opendir(".");
    int n = 0;
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}
static void remove_folder(void) {
    DIR *d = folder[0] && !chdir(folder) ? opendir(".") : NULL;
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.' && unlink(e->d_name)) rmdir(e->d_name);
    if (d) closedir(d), rmdir(folder);
}

// ==== Making models: tensors with known values, packed as the file format describes ==============

// Half precision by its definition: sign, exponent, fraction.
static double half_value(unsigned h) {
    int e = (int)(h >> 10 & 31), f = (int)(h & 1023);
    double a = e == 0 ? ldexp(f, -24) : e == 31 ? (f ? NAN : INFINITY) : ldexp(1024 + f, e - 25);
    return h & 0x8000 ? -a : a;
}
// The nearest half, of two the even one; at most 65504.
static unsigned nearest_half(double x) {
    double a = fabs(x);
    unsigned sign = signbit(x) ? 0x8000 : 0, low = 0, high = 0x7bff;
    if (!(a < 65504)) return sign | 0x7bff;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        if (half_value(middle) <= a) low = middle;
        else high = middle;
    }
    double down = a - half_value(low), up = half_value(high) - a;
    return sign | (down < up || (down == up && !(low & 1)) ? low : high);
}

typedef struct {
    int dtype, rows, cols;
    float *values;  // (rows, cols) what the bytes stand for
    uint8_t *bytes;
    size_t n;
} Tensor;

static Tensor vector(int cols, double mean, double deviation) {
    Tensor t = {ROWS, 1, cols, get((size_t)cols, 4), NULL, (size_t)cols * 4};
    for (int i = 0; i < cols; i++) t.values[i] = (float)(mean + deviation * spread());
    t.bytes = (uint8_t *)t.values;
    return t;
}
static Tensor bytes_tensor(const Buffer *b) {
    return (Tensor){BYTES, 1, (int)b->n, NULL, b->p, b->n};
}

// A random matrix whose products with numbers of size 1 have about that size.
static Tensor matrix(int dtype, int rows, int cols) {
    size_t nb = (size_t)(cols + 31) / 32, panels = (size_t)(rows + 15) / 16, wide = (size_t)cols;
    size_t scales = dtype == Q4A ? 64 : 32;  // bytes of a block's scales, in front of its quants
    size_t block = scales + (dtype == Q8 ? 512 : 256);
    size_t panel = dtype == BF16 ? wide * 32 : dtype < BF16 ? wide * 64 : nb * block;
    Tensor t = {dtype, rows, cols, get((size_t)rows * wide, 4), NULL,
                dtype == ROWS ? (size_t)rows * wide * 4 : panels * panel};
    t.bytes = get(t.n, 1);
    double size = 1 / sqrt(cols), scale = 0, minimum = 0;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float *value = &t.values[(size_t)r * wide + (size_t)c];
            uint8_t *p = t.bytes + (size_t)(r / 16) * panel;
            int R = r % 16, b = c / 32, i = c % 32;
            if (dtype <= BF16) {
                uint32_t u;
                *value = (float)(size * spread());
                memcpy(&u, value, 4);
                if (dtype == BF16) u &= 0xffff0000u;
                memcpy(value, &u, 4);
                uint16_t upper = (uint16_t)(u >> 16);
                if (dtype == ROWS) memcpy(t.bytes + 4 * ((size_t)r * wide + (size_t)c), value, 4);
                if (dtype == F32) memcpy(p + 4 * (c * 16 + R), value, 4);
                if (dtype == BF16) memcpy(p + 2 * (c * 16 + R), &upper, 2);
                continue;
            }
            if (i == 0) {  // a new block: its scale, and a minimum
                scale = size / (dtype == Q8 ? 73 : 4.6) * (0.5 + uniform());
                uint16_t h = (uint16_t)nearest_half(scale);
                uint16_t m = (uint16_t)nearest_half(-7.5 * scale * (0.8 + 0.4 * uniform()));
                scale = half_value(h), minimum = half_value(m);
                memcpy(p + (size_t)b * block + 2 * R, &h, 2);
                if (dtype == Q4A) memcpy(p + (size_t)b * block + 32 + 2 * R, &m, 2);
            }
            int q = dtype == Q8 ? below(255) - 127 : below(16);
            uint8_t *quants = p + (size_t)b * block + scales;
            if (dtype == Q8) quants[(i / 4 * 16 + R) * 4 + i % 4] = (uint8_t)q;
            else quants[(i % 16 / 4 * 16 + R) * 4 + i % 4] |= (uint8_t)(i < 16 ? q : q << 4);
            if (dtype == Q8) *value = (float)(scale * q);
            if (dtype == Q4) *value = (float)(scale * (q - 8));
            if (dtype == Q4A) *value = (float)(scale * q + minimum);
        }
    return t;
}

enum { ASSORTED = BYTES };  // the dtype of a model whose matrices have each another one
enum { TIED = 1, BIASES = 2, HEAD_NORMS = 4, SANDWICH = 8, LOCAL_FREQS = 16, ALL_BIASES = 32,
       NO_NORMS = 64, NO_GATE = 128, POSITIONS = 256, SINKS = 512, CAPS = 1024, GROWTH = 2048,
       LIMIT = 4096, EXPERTS = 8192, ROUTER_BIAS = 16384, CHOICE_BIAS = 32768 };  // features
enum { N_EXPERTS = 7, N_ACTIVE = 2, EXPERT_HIDDEN = 20 };
typedef struct {
    const char *name;
    int dtype, embedding, features;
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, seq_len;
    int activation, window;
    unsigned local;  // bit l: layer l is local
    float embed_scale;
    uint32_t flags;
    int shared;      // how many of the experts are
    unsigned dense;  // bit l: layer l has no experts
} Shape;

enum { ATTN_NORM, WQ, WK, WV, BQ, BK, BV, Q_NORM, K_NORM, WO, POST_ATTN, FFN_NORM, GATE, UP, DOWN,
       POST_FFN, ATTN_BIAS, FFN_BIAS, BO, B_GATE, B_UP, B_DOWN, SINK, ROUTER, ROUTER_BIAS_,
       CHOICE_BIAS_, PER_LAYER };
static const char *const tensor_names[PER_LAYER] = {
    "attn_norm", "wq", "wk", "wv", "bq", "bk", "bv", "q_norm", "k_norm", "wo", "post_attn_norm",
    "ffn_norm", "w_gate", "w_up", "w_down", "post_ffn_norm", "attn_norm_bias", "ffn_norm_bias",
    "bo", "b_gate", "b_up", "b_down", "sinks", "router", "router_bias", "choice_bias"};
enum { MOST_LAYERS = 16 };
typedef struct {
    Shape s;
    float eps, attn_scale;
    Tensor score, rope[2], embedding, positions, layer[MOST_LAYERS][PER_LAYER];
    Tensor final_norm, final_bias, classifier;
    Tensor check_ids, check_norms, check_logits, check_cases;
    uint64_t tokenizer_hash;
} Made;

static int dtype_of(const Shape *s, int i) { return s->dtype == ASSORTED ? F32 + i % 5 : s->dtype; }
// Some such matrices, one after the other.
static Tensor matrices(int count, int dtype, int rows, int cols) {
    Tensor all = matrix(dtype, rows, cols);
    for (int e = 1; e < count; e++) {
        Tensor one = matrix(dtype, rows, cols);
        size_t values = (size_t)rows * (size_t)cols;
        float *more = get((size_t)(e + 1) * values, 4);
        uint8_t *bytes = get((size_t)(e + 1) * one.n, 1);
        memcpy(more, all.values, (size_t)e * values * 4);
        memcpy(more + (size_t)e * values, one.values, values * 4);
        memcpy(bytes, all.bytes, all.n), memcpy(bytes + all.n, one.bytes, one.n);
        all = (Tensor){dtype, (e + 1) * rows, cols, more, bytes, all.n + one.n};
    }
    return all;
}
static Tensor vectors(int count, int cols, double mean, double deviation) {
    Tensor t = vector(count * cols, mean, deviation);
    t.rows = count, t.cols = cols;
    return t;
}
static bool has_experts(const Shape *s, int l) {
    return s->features & EXPERTS && !(s->dense >> l & 1);
}

// The feed-forward part of a layer, and what else the newer features need.
static void make_feed_forward(const Shape *s, int l, Tensor *t) {
    int count = has_experts(s, l) ? N_EXPERTS : 1, hidden = count > 1 ? EXPERT_HIDDEN : s->hidden;
    t[GATE] = matrices(count, dtype_of(s, l + 4), hidden, s->dim);
    if (!(s->features & NO_GATE)) t[UP] = matrices(count, dtype_of(s, l + 5), hidden, s->dim);
    t[DOWN] = matrices(count, dtype_of(s, l + 6), s->dim, hidden);
    if (s->features & ALL_BIASES) {
        t[BO] = vector(s->dim, 0, 0.3);
        t[B_GATE] = vectors(count, hidden, 0, 0.3);
        if (!(s->features & NO_GATE)) t[B_UP] = vectors(count, hidden, 0, 0.3);
        t[B_DOWN] = vectors(count, s->dim, 0, 0.3);
    }
    if (s->features & SINKS) t[SINK] = vector(s->heads, 0, 1);
    if (s->flags & CENTERED && !(s->features & NO_NORMS))
        t[ATTN_BIAS] = vector(s->dim, 0, 0.2), t[FFN_BIAS] = vector(s->dim, 0, 0.2);
    if (count == 1) return;
    t[ROUTER] = matrix(F32, N_EXPERTS, s->dim);
    if (s->features & ROUTER_BIAS) t[ROUTER_BIAS_] = vector(N_EXPERTS, 0, 0.5);
    if (s->features & CHOICE_BIAS) t[CHOICE_BIAS_] = vector(N_EXPERTS, 0, 0.5);
}

static Made make_weights(const Shape *s) {
    Made m = {.s = *s, .eps = 1e-5f, .attn_scale = (float)(1 / sqrt(s->head_dim))};
    int qd = s->heads * s->head_dim, kvd = s->kv_heads * s->head_dim, half = s->head_dim / 2;
    for (int t = 0; t <= !!(s->features & LOCAL_FREQS); t++) {
        m.rope[t] = vector(half, 0, 0);
        for (int i = 0; i < half; i++)
            m.rope[t].values[i] = (float)pow(t ? 100 : 10000, -(double)i / half);
    }
    m.embedding = matrix(s->embedding, s->vocab, s->dim);
    for (int l = 0; l < s->layers; l++) {
        Tensor *t = m.layer[l];
        int norms[] = {ATTN_NORM, FFN_NORM, POST_ATTN, POST_FFN};
        int first = s->features & NO_NORMS ? 2 : 0, end = s->features & SANDWICH ? 4 : 2;
        for (int i = first; i < end; i++) t[norms[i]] = vector(s->dim, 1, 0.1);
        t[WQ] = matrix(dtype_of(s, l), qd, s->dim);
        t[WK] = matrix(dtype_of(s, l + 1), kvd, s->dim);
        t[WV] = matrix(dtype_of(s, l + 2), kvd, s->dim);
        for (int i = BQ; i <= BV && s->features & (BIASES | ALL_BIASES); i++)
            t[i] = vector(i == BQ ? qd : kvd, 0, 0.3);
        for (int i = Q_NORM; i <= K_NORM && s->features & HEAD_NORMS; i++)
            t[i] = vector(s->flags & WIDE_NORMS ? i == Q_NORM ? qd : kvd : s->head_dim, 1.2, 0.1);
        t[WO] = matrix(dtype_of(s, l + 3), s->dim, qd);
        make_feed_forward(s, l, t);
    }
    m.final_norm = vector(s->dim, 1, 0.1);
    if (s->flags & CENTERED) m.final_bias = vector(s->dim, 0, 0.2);
    if (s->features & POSITIONS) m.positions = matrix(s->embedding, s->seq_len, s->dim);
    if (!(s->features & TIED)) m.classifier = matrix(s->embedding, s->vocab, s->dim);
    return m;
}

// Writes both hashes of a version 5 file anew.
static void seal(Buffer *b) {
    if (b->n < 512) return;
    set64(b->p + 16, 0), set64(b->p + 32, 0);
    size_t directory = 512 + 64 * (size_t)read_u32(b->p + 40);
    uint64_t header = hash64(b->p, directory < b->n ? directory : b->n);
    set64(b->p + 16, hash64(b->p, b->n)), set64(b->p + 32, header);
}

static void put_tensor(Buffer *b, Buffer *directory, const char *name, int layer, const Tensor *t) {
    if (!t->bytes && !t->n) return;
    char padded_name[32] = {0};
    snprintf(padded_name, sizeof padded_name, "%s", name);
    align(b, 64);
    put(directory, padded_name, 32);
    put32(directory, t->dtype), put32(directory, t->rows), put32(directory, t->cols);
    put32(directory, layer);
    put(directory, &(uint64_t){b->n}, 8), put(directory, &(uint64_t){t->n}, 8);
    put(b, t->bytes, t->n);
}
static Buffer version_5(const Made *m) {
    const Shape *s = &m->s;
    const struct { const char *name; const Tensor *t; } whole[] = {
        {"rope_freqs", &m->rope[0]}, {"rope_freqs_local", &m->rope[1]},
        {"token_embedding", &m->embedding}, {"final_norm", &m->final_norm},
        {"final_norm_bias", &m->final_bias}, {"position_embedding", &m->positions},
        {"classifier", &m->classifier}, {"score", &m->score}, {"check_ids", &m->check_ids},
        {"check_norms", &m->check_norms}, {"check_logits", &m->check_logits},
        {"check_cases", &m->check_cases}};
    for (size_t offset = 512, n = 0;; offset = 512 + n) {  // again, with the directory's true size
        Buffer b = {0}, directory = {0};
        put(&b, NULL, offset);
        for (int l = 0; l < s->layers; l++)
            for (int i = 0; i < PER_LAYER; i++)
                put_tensor(&b, &directory, tensor_names[i], l, &m->layer[l][i]);
        for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
            put_tensor(&b, &directory, whole[i].name, -1, whole[i].t);
        align(&b, 64);
        if ((n = directory.n) + 512 != offset) continue;
        memcpy(b.p + 512, directory.p, n);
        set32(b.p, 0x616b3432), set32(b.p + 4, 5);
        set64(b.p + 8, m->tokenizer_hash), set64(b.p + 24, b.n), set32(b.p + 40, (int)n / 64);
        memcpy(b.p + 48, s->name, strlen(s->name));
        int sizes[] = {s->dim, s->hidden, s->layers, s->heads, s->kv_heads, s->vocab, s->seq_len,
                       s->head_dim};
        memcpy(b.p + 112, sizes, sizeof sizes);
        set_float(b.p + 144, m->eps), set32(b.p + 148, s->flags), set32(b.p + 152, s->activation);
        set_float(b.p + 156, s->embed_scale), set_float(b.p + 160, m->attn_scale);
        set32(b.p + 164, s->window), set32(b.p + 168, s->local);
        if (s->features & CAPS) set_float(b.p + 200, 2), set_float(b.p + 204, 3);
        if (s->features & GROWTH) set_float(b.p + 208, 0.4f), set32(b.p + 212, 16);
        if (s->features & LIMIT) set_float(b.p + 216, 0.7f);
        int experts[] = {N_EXPERTS, s->shared, N_ACTIVE, EXPERT_HIDDEN};
        if (s->features & EXPERTS) memcpy(b.p + 220, experts, sizeof experts);
        seal(&b);
        return b;
    }
}

// llama2.c's files: version 0 has its tensors in another order than version 1.
static Buffer llama2c_file(const Made *m, int version) {
    const Shape *s = &m->s;
    bool tied = s->features & TIED;
    int head[] = {s->dim, s->hidden, s->layers, s->heads, s->kv_heads,
                  tied || version ? s->vocab : -s->vocab, s->seq_len};
    int order[2][9] = {{ATTN_NORM, WQ, WK, WV, WO, FFN_NORM, GATE, DOWN, UP},
                       {ATTN_NORM, FFN_NORM, WQ, WK, WV, WO, GATE, DOWN, UP}};
    Buffer b = {0};
    if (version) put32(&b, 0x616b3432), put32(&b, version);
    put(&b, head, sizeof head);
    if (version) put(&b, &(uint8_t){tied}, 1), put(&b, NULL, 256 - b.n);
    if (!version) put(&b, m->embedding.bytes, m->embedding.n);
    for (int i = 0; i < 9; i++) {
        for (int l = 0; l < s->layers; l++)
            put(&b, m->layer[l][order[version][i]].bytes, m->layer[l][order[version][i]].n);
        if (version && i == 1) {
            put(&b, m->final_norm.bytes, m->final_norm.n);
            put(&b, m->embedding.bytes, m->embedding.n);
        }
    }
    if (!version) {
        put(&b, m->final_norm.bytes, m->final_norm.n);
        put(&b, NULL, (size_t)(s->seq_len * s->head_dim) * 4);
    }
    if (!tied) put(&b, m->classifier.bytes, m->classifier.n);
    return b;
}

// The shapes of the tests: the features of the families, in odd sizes.
enum { LLAMA, QWEN2, QWEN3, GEMMA, GPT, NEOX, OLMO, OSS, GLM, N_FAMILIES };
static Shape family(int which, int dtype) {
    static const Shape shapes[] = {
        {"llama", 0, 0, 0, 64, 96, 2, 4, 2, 16, 77, 700, 0, 0, 0, 1, 0, 0, 0},
        {"qwen2", 0, 0, TIED | BIASES, 37, 51, 2, 3, 1, 12, 77, 700, 0, 0, 0, 1, 0, 0, 0},
        {"qwen3", 0, 0, HEAD_NORMS, 40, 70, 2, 5, 1, 24, 83, 700, 0, 9, 1, 1, 0, 0, 0},
        {"gemma", 0, 0, TIED | HEAD_NORMS | SANDWICH | LOCAL_FREQS, 36, 50, 3, 4, 4, 12, 77, 700, 1,
         21, 5, 6, 0, 0, 0},
        {"gpt", 0, 0, TIED | ALL_BIASES | NO_GATE | POSITIONS, 40, 56, 2, 3, 3, 12, 77, 700,
         GELU, 0, 0, 1, CENTERED, 0, 0},
        {"neox", 0, 0, ALL_BIASES | NO_GATE | CAPS, 37, 51, 2, 3, 1, 12, 77, 700, RELU_SQUARED, 0,
         0, 1, CENTERED | PARALLEL, 0, 0},
        {"olmo", 0, 0, HEAD_NORMS | SANDWICH | NO_NORMS | POSITIONS | CAPS | GROWTH, 40, 54, 2,
         4, 2, 12, 77, 700, 0, 9, 1, 1, WIDE_NORMS, 0, 0},
        {"oss", 0, 0, ALL_BIASES | HEAD_NORMS | SINKS | LIMIT | EXPERTS | ROUTER_BIAS, 36, 50, 2, 4,
         2, 12, 77, 700, GELU_SIGMOID, 9, 1, 3, NORM_AFTER_ROPE | FULL_SHARES, 0, 0},
        {"glm", 0, 0, EXPERTS | CHOICE_BIAS | SINKS, 48, 70, 2, 4, 2, 16, 77, 700, 0, 0, 0, 3,
         SIGMOID_ROUTER, 2, 1},
    };
    Shape s = shapes[which];
    s.dtype = dtype;
    s.embedding = dtype >= Q4 ? Q8 : dtype;
    return s;
}
static const char *const formats[] = {"rows", "f32", "bf16", "q8", "q4", "q4a", "assorted"};

static Model open_made(const Made *made, const char *name) {
    Buffer b = version_5(made);
    Model m;
    load_model(&m, keep(name, &b));
    return m;
}

// ---- The second transformer: double precision, one token after the other, nothing clever

// x rounded to int8 by blocks, as activations are before they meet quantized weights (32 numbers),
// keys, whose scales are in half precision (32), and attention's weights (32 positions); values
// have one block. Returns the last scale.
static double round_activations(double *x, int n, int block, bool half) {
    double scale = 0;
    for (int b = 0; b < n; b += block) {
        double most = 0;
        int end = b + block < n ? b + block : n;
        for (int i = b; i < end; i++) most = worse(most, fabs(x[i]));
        double d = most / 127;
        scale = half ? half_value(nearest_half(d)) : d;
        for (int i = b; i < end; i++) x[i] = d < FLT_MIN ? 0 : nearbyint(x[i] / d) * scale;
    }
    return scale;
}
static void times(double *y, const Tensor *w, const double *input) {
    double *x = get((size_t)w->cols, 8);
    memcpy(x, input, (size_t)w->cols * 8);
    if (w->dtype >= Q8) round_activations(x, w->cols, 32, false);
    for (int r = 0; r < w->rows; r++) {
        y[r] = 0;
        for (int c = 0; c < w->cols; c++)
            y[r] += (double)w->values[(size_t)r * (size_t)w->cols + (size_t)c] * x[c];
    }
}
static void norm_(double *y, const double *x, const Tensor *w, double eps) {
    double sum = 0;
    for (int i = 0; i < w->cols; i++) sum += x[i] * x[i];
    double scale = 1 / sqrt(sum / w->cols + eps);
    for (int i = 0; i < w->cols; i++) y[i] = x[i] * scale * (double)w->values[i];
}
static void turn(double *head, const Tensor *freqs, int pos) {
    for (int i = 0; i < freqs->cols; i++) {
        double angle = (double)freqs->values[i] * pos, a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cos(angle) - b * sin(angle);
        head[2 * i + 1] = a * sin(angle) + b * cos(angle);
    }
}
static void plus(double *x, const double *y, int n) { for (int i = 0; i < n; i++) x[i] += y[i]; }
static void plus_bias(double *x, const Tensor *b) {
    for (int i = 0; b->bytes && i < b->cols; i++) x[i] += (double)b->values[i];
}

// One head's answer `out`: the average of `values` by softmax(q . keys), for positions first to
// pos; those of a position are `apart` after the one before. scales: of int8 values, or NULL.
typedef struct {
    const double *keys, *values, *scales;
    int apart, scales_apart, head_dim;
    double cap;          // of the scores; 0: none
    const float *sink;   // a score without a value, or NULL
} Heads;
static void average(double *out, const double *q, const Heads *s, int first, int pos,
                    double scale) {
    double total = s->sink ? exp((double)*s->sink) : 0;
    double *p = get((size_t)pos + 1, 8), *v = get((size_t)pos + 1, 8);
    for (int j = first; j <= pos; j++) {
        for (int d = 0; d < s->head_dim; d++) p[j] += q[d] * s->keys[j * s->apart + d];
        p[j] *= scale;
        if (s->cap > 0) p[j] = s->cap * tanh(p[j] / s->cap);
        total += p[j] = exp(p[j]);
        v[j] = s->scales ? s->scales[j * s->scales_apart] : 1;
    }
    for (int j = first; j <= pos; j++) p[j] = p[j] / total * v[j];
    if (s->scales) round_activations(p, pos + 1, 32, false);
    for (int d = 0; d < s->head_dim; d++) {
        out[d] = 0;
        for (int j = first; j <= pos; j++)
            if (v[j] > 0) out[d] += p[j] / v[j] * s->values[j * s->apart + d];
    }
}

// A norm of the residual stream: LayerNorm, RMSNorm or, without weights, none.
static void stream_norm(double *y, const double *x, const Made *m, const Tensor *w,
                        const Tensor *bias) {
    double mean = 0;
    for (int i = 0; i < m->s.dim; i++) mean += x[i] / m->s.dim;
    for (int i = 0; i < m->s.dim; i++) y[i] = x[i] - (m->s.flags & CENTERED ? mean : 0);
    if (w->bytes) norm_(y, y, w, (double)m->eps);
    plus_bias(y, bias);
}

static double act(int kind, double x) {
    double u = sqrt(2 / 3.14159265358979324) * (x + 0.044715 * x * x * x);
    return kind == SILU ? x / (1 + exp(-x)) : kind == GELU_TANH ? 0.5 * x * (1 + tanh(u)) :
           kind == GELU ? 0.5 * x * (1 + erf(x / sqrt(2))) :
           kind == RELU_SQUARED ? (x > 0 ? x * x : 0) : x / (1 + exp(-1.702 * x));
}

// Matrix or vector number e of some.
static Tensor one_of(const Tensor *t, int e, int count) {
    Tensor one = *t;
    one.rows /= count;
    if (t->bytes) one.values += (size_t)e * (size_t)one.rows * (size_t)one.cols;
    return one;
}
// y = feed-forward layer number e of `count`.
static void think(double *y, const Made *m, const Tensor *t, const double *x, int e, int count) {
    Tensor w[6];
    const int which[] = {GATE, UP, DOWN, B_GATE, B_UP, B_DOWN};
    for (int i = 0; i < 6; i++) w[i] = one_of(&t[which[i]], e, count);
    int n = w[0].rows;
    double *g = get((size_t)n, 8), *up = get((size_t)n, 8), limit = (double)0.7f;
    times(g, &w[0], x), plus_bias(g, &w[3]);
    if (w[1].bytes) times(up, &w[1], x), plus_bias(up, &w[4]);
    for (int i = 0; i < n; i++) {
        if (m->s.features & LIMIT) g[i] = fmin(g[i], limit);
        if (m->s.features & LIMIT) up[i] = 1 + fmax(-limit, fmin(up[i], limit));
        g[i] = act(m->s.activation, g[i]) * (w[1].bytes ? up[i] : 1);
    }
    times(y, &w[2], g), plus_bias(y, &w[5]);
}
// The same of experts: each of those chosen times its share.
static void think_with_experts(double *y, const Made *m, const Tensor *t, const double *x) {
    int n = N_EXPERTS - m->s.shared;
    bool alone = m->s.flags & SIGMOID_ROUTER;
    double score[N_EXPERTS], share[N_EXPERTS] = {0}, total = 0, chosen = 0;
    double *answer = get((size_t)m->s.dim, 8);
    times(score, &t[ROUTER], x), plus_bias(score, &t[ROUTER_BIAS_]);
    for (int e = 0; e < n; e++) total += exp(score[e]);
    for (int e = 0; e < N_EXPERTS; e++)
        score[e] = alone || e >= n ? 1 / (1 + exp(-score[e])) : exp(score[e]) / total;
    for (int e = 0; e < N_EXPERTS; e++) {
        int better = 0;
        const float *bias = t[CHOICE_BIAS_].values;
        for (int o = 0; o < n; o++)
            better += score[o] + (bias ? (double)bias[o] : 0) >
                      score[e] + (bias ? (double)bias[e] : 0);
        if (e >= n || better < N_ACTIVE) share[e] = score[e];
        if (e < n) chosen += share[e];
    }
    for (int i = 0; i < m->s.dim; i++) y[i] = 0;
    for (int e = 0; e < N_EXPERTS; e++) {
        if (share[e] > 0) think(answer, m, t, x, e, N_EXPERTS);
        double weight_ = share[e] / (m->s.flags & FULL_SHARES && e < n ? chosen : 1);
        for (int i = 0; i < m->s.dim && share[e] > 0; i++) y[i] += weight_ * answer[i];
    }
}

// Norm and position of heads x (n), in either order.
static void finish_double(const Made *m, double *x, int n, const Tensor *w, const Tensor *freqs,
                          int pos) {
    for (int step = 0; step < 2; step++) {
        bool turns = (step == 0) == !!(m->s.flags & NORM_AFTER_ROPE);
        for (int h = 0; h < n && turns; h += m->s.head_dim) turn(x + h, freqs, pos);
        for (int h = 0; h < n && !turns && w->bytes; h += w->cols)
            norm_(x + h, x + h, w, (double)m->eps);
    }
}

// Attention of a token: xb becomes what goes through wo. keys and values are of all layers.
typedef struct { double *keys, *values, *scales; int n; } Memory;  // (layers, n, kv_dim)
static void attend_double(const Made *m, const Memory *memory, int l, int pos, double *xb,
                          double *out) {
    const Shape *s = &m->s;
    const Tensor *t = m->layer[l];
    int hd = s->head_dim, qd = s->heads * hd, kvd = s->kv_heads * hd, at = l * memory->n * kvd;
    bool int8 = s->embedding >= Q8, halves = s->embedding == BF16;  // keys and values
    bool local = s->window && s->local >> l & 1;
    int row = at + pos * kvd, first = local && pos >= s->window ? pos - s->window + 1 : 0;
    double *k = memory->keys + row, *v = memory->values + row, *q = get((size_t)qd, 8);
    const Tensor *freqs = &m->rope[local && s->features & LOCAL_FREQS];
    times(q, &t[WQ], xb), times(k, &t[WK], xb), times(v, &t[WV], xb);
    plus_bias(q, &t[BQ]), plus_bias(k, &t[BK]), plus_bias(v, &t[BV]);
    finish_double(m, q, qd, &t[Q_NORM], freqs, pos);
    finish_double(m, k, kvd, &t[K_NORM], freqs, pos);
    for (int i = 0; i < qd && s->features & GROWTH; i++)
        q[i] *= 1 + (double)0.4f * log(1 + pos / 16);
    for (int h = 0; h < s->heads && int8; h++) round_activations(q + h * hd, hd, 32, false);
    for (int h = 0; h < s->kv_heads && int8; h++) {
        round_activations(k + h * hd, hd, 32, true);
        memory->scales[row + h] = round_activations(v + h * hd, hd, hd, false);
    }
    for (int i = 0; i < kvd && halves; i++)
        k[i] = half_value(nearest_half(k[i])), v[i] = half_value(nearest_half(v[i]));
    for (int h = 0; h < s->heads; h++) {
        int kv_head = h / (s->heads / s->kv_heads);
        Heads seen_ = {memory->keys + at + kv_head * hd, memory->values + at + kv_head * hd,
                       int8 ? memory->scales + at + kv_head : NULL, kvd, kvd, hd,
                       s->features & CAPS ? 2 : 0, t[SINK].bytes ? t[SINK].values + h : NULL};
        average(out + h * hd, q + h * hd, &seen_, first, pos, (double)m->attn_scale);
    }
    times(xb, &t[WO], out), plus_bias(xb, &t[BO]);
    if (t[POST_ATTN].bytes) norm_(xb, xb, &t[POST_ATTN], (double)m->eps);
}

// Logits (n, vocab) of all positions of ids (n), and norms (layers + 1) of the last residual.
static void reference(const Made *m, const int *ids, int n, double *logits, double *norms) {
    const Shape *s = &m->s;
    int dim = s->dim;
    size_t width = (size_t)(dim + s->heads * s->head_dim + s->hidden);
    size_t all = (size_t)(s->layers * n * s->kv_heads * s->head_dim);
    Memory memory = {get(all, 8), get(all, 8), get(all, 8), n};
    double *x = get(width, 8), *xb = get(width, 8), *out = get(width, 8), *y = get(width, 8);
    for (int pos = 0; pos < n; pos++) {
        for (int i = 0; i < dim; i++) {
            x[i] = (double)m->embedding.values[ids[pos] * dim + i] * (double)s->embed_scale;
            if (m->positions.bytes) x[i] += (double)m->positions.values[pos * dim + i];
        }
        for (int l = 0; l <= s->layers; l++) {
            double sum = 0;
            for (int i = 0; i < dim; i++) sum += x[i] * x[i];
            if (norms) norms[l] = sqrt(sum);
            if (l == s->layers) break;
            const Tensor *t = m->layer[l];
            stream_norm(xb, x, m, &t[ATTN_NORM], &t[ATTN_BIAS]);
            attend_double(m, &memory, l, pos, xb, out);
            if (!(s->flags & PARALLEL)) plus(x, xb, dim);
            stream_norm(out, x, m, &t[FFN_NORM], &t[FFN_BIAS]);
            if (s->flags & PARALLEL) plus(x, xb, dim);
            if (has_experts(s, l)) think_with_experts(y, m, t, out);
            else think(y, m, t, out, 0, 1);
            if (t[POST_FFN].bytes) norm_(y, y, &t[POST_FFN], (double)m->eps);
            plus(x, y, dim);
        }
        stream_norm(xb, x, m, &m->final_norm, &m->final_bias);
        double *row = logits + pos * s->vocab;
        times(row, m->classifier.bytes ? &m->classifier : &m->embedding, xb);
        for (int i = 0; i < s->vocab && s->features & CAPS; i++) row[i] = 3 * tanh(row[i] / 3);
    }
}

// Gives a made model its certificate: a few tokens, and what the second transformer makes of them.
static void certify(Made *m) {
    enum { N = 10 };
    int ids[N], vocab = m->s.vocab;
    double *logits = get((size_t)(N * vocab), 8), norms[MOST_LAYERS + 1];
    for (int i = 0; i < N; i++) ids[i] = below(vocab);
    reference(m, ids, N, logits, norms);
    Buffer b = bytes_of(ids, sizeof ids);
    m->check_ids = bytes_tensor(&b);
    m->check_norms = vector(m->s.layers + 1, 0, 0), m->check_logits = vector(vocab, 0, 0);
    for (int l = 0; l <= m->s.layers; l++) m->check_norms.values[l] = (float)norms[l];
    for (int i = 0; i < vocab; i++)
        m->check_logits.values[i] = (float)logits[(N - 1) * vocab + i];
}

// Part 4's functions are in use, and nobody watches.
static void use_fast_functions(void) {
#ifndef PLAIN
    matmul = matmul_fast, attention = attention_fast;
#endif
    watch = NULL;
}
static void set_threads(int n) {  // 1, or all of the three that were started
#ifndef PLAIN
    static bool started;
    if (!started && n > 1) start_threads(3), started = true;
    pool.n_threads = n > 1 ? 3 : 1;
#endif
    (void)n;
}

// ==== 1. Numbers =================================================================================

static void test_halves(void) {
    int wrong = 0, back = 0;
    for (unsigned h = 0; h < 65536; h++) {
        double expected = half_value(h), x = (double)half_to_float((uint16_t)h);
        bool same = isnan(expected) ? isnan(x) : x == expected && signbit(x) == signbit(expected);
        wrong += !same;
        back += (h & 0x7c00) != 0x7c00 && float_to_half((float)x) != h;
    }
    CHECK(!wrong, "every half becomes the float it stands for: %d do not", wrong);
    CHECK(!back, "every finite half survives the way to float and back: %d do not", back);
    wrong = 0;
    for (unsigned h = 0; h < 0x7bff; h++) {  // between two neighbours: the middle, and beside it
        double low = half_value(h), middle = (low + half_value(h + 1)) / 2;
        float x[] = {(float)middle, nextafterf((float)middle, 0), nextafterf((float)middle, 1e9f)};
        for (int i = 0; i < 3; i++)
            wrong += float_to_half(x[i]) != nearest_half((double)x[i]) ||
                     float_to_half(-x[i]) != nearest_half(-(double)x[i]);
    }
    for (int i = 0; i < 200000; i++) {
        float x = float_of((uint32_t)rnd());
        wrong += !isnan(x) && float_to_half(x) != nearest_half((double)x);
    }
    CHECK(!wrong, "floats become the nearest half, of two the even one: %d do not", wrong);
    const float odd[] = {1e6f, -1e6f, 65520, INFINITY, -INFINITY, 0x1p-25f, 0x1.8p-25f, -0.0f};
    const int bits[] = {0x7bff, 0xfbff, 0x7bff, 0x7bff, 0xfbff, 0, 1, 0x8000};
    for (int i = 0; i < 8; i++)
        CHECK(float_to_half(odd[i]) == bits[i], "%g becomes half %x", (double)odd[i], bits[i]);
}

static void test_functions(void) {
    double off_exp = 0, off_log = 0, off_double = 0, off_angle = 0;
    for (int i = 0; i < 200000; i++) {
        float x = (float)(uniform() * 174 - 87), cosine, sine;
        off_exp = worse(off_exp, fabs((double)exp_(x) / exp((double)x) - 1));
        double y = (uniform() * 2 - 1) * (i % 2 ? 700 : 20),
               z = ldexp(1 + uniform(), below(120) - 60), off = fabs(exp_double(y) / exp(y) - 1);
        off_double = worse(off_double, i % 2 ? off / 1000 : off);
        off_log = worse(off_log, fabs(log_(z) - log(z)) / worse(1, fabs(log(z))));
        double angle = (double)(float)(uniform() * (i % 2 ? 100 : 1 << 24));
        cos_sin(angle, &cosine, &sine);
        off_angle = worse(off_angle, fabs((double)cosine - cos(angle)));
        off_angle = worse(off_angle, fabs((double)sine - sin(angle)));
    }
    CHECK(off_exp < 2e-7, "exp_ is within 2e-7 of e^x: %g", off_exp);
    CHECK(off_double < 1e-12, "exp_double is within 1e-12 of e^x up to 20, 1e-9 up to 700: %g",
          off_double);
    CHECK(off_log < 1e-15, "log_ is within 1e-15 of ln x: %g", off_log);
    CHECK(off_angle < 6e-8, "cos_sin is within 6e-8 up to 2^24: %g", off_angle);
    CHECK(exp_(0) == 1 && exp_(-1e30f) < 2e-38f && exp_(-INFINITY) >= 0 && isfinite(exp_(1e30f)),
          "exp_ has sane values at its ends");
}

static void test_hashes(void) {
    uint8_t all[256] = {0};
    // computed by another program
    struct { const char *text; size_t n; uint64_t hash; } hashes[] = {
        {"", 0, 0}, {"a", 1, 0xa5efbf958775a396u}, {"language", 8, 0x68c6e8296a4260ddu},
        {"A language model is two files.", 30, 0x65b07df08b7e5ff1u}};
    for (int i = 0; i < 4; i++)
        CHECK(hash64(hashes[i].text, hashes[i].n) == hashes[i].hash, "hash64 of \"%s\"",
              hashes[i].text);
    CHECK(hash64(all, 100) == 0xb93881ec5025d697u, "hash64 of 100 zeros");
    for (int i = 0; i < 256; i++) all[i] = (uint8_t)i;
    CHECK(hash64(all, 256) == 0xfb32f48b11c21080u, "hash64 of the bytes 0 to 255");
    CHECK(mix64(256) + hash_words(all, 80, 0) + hash_words(all + 80, 176, 10) == hash64(all, 256),
          "a hash is the sum of its pieces' sums");
}

static void test_arrays(void) {
    float x[700], y[700], w[700];
    double off_norm = 0, off_soft = 0, off_sum = 0;
    int wrong = 0;
    for (int n = 1; n < 700; n += 1 + n / 9) {
        double squares = 0, products_ = 0, exps = 0, sum = 0, most = -1e9;
        for (int i = 0; i < n; i++) {
            x[i] = (float)(4 * spread()), w[i] = (float)spread();
            squares += (double)x[i] * (double)x[i], products_ += (double)x[i] * (double)w[i];
            sum += (double)x[i], most = worse(most, (double)x[i]);
        }
        off_sum = worse(off_sum, fabs((double)sum16(x, w, n) - products_) / sqrt(n));
        off_sum = worse(off_sum, fabs((double)sum16(x, NULL, n) - sum) / sqrt(n));
        wrong += (double)largest(x, n) != most || (double)x[argmax(x, n)] != most;
        rmsnorm(y, x, w, n, 1e-5f);
        double size = sqrt(squares / n + 1e-5);
        for (int i = 0; i < n; i++)
            off_norm = worse(off_norm, fabs((double)y[i] - (double)(w[i] * x[i]) / size));
        for (int i = 0; i < n; i++) exps += exp((double)x[i] - most);
        memcpy(y, x, sizeof x);
        softmax(y, n);
        for (int i = 0; i < n; i++)
            off_soft = worse(off_soft, fabs((double)y[i] - exp((double)x[i] - most) / exps));
    }
    CHECK(!wrong, "largest and argmax find the largest number");
    CHECK(off_sum < 1e-5, "sum16 adds up all products, or numbers: off by %g", off_sum);
    CHECK(off_norm < 1e-5, "rmsnorm divides by the root of the mean square: off by %g", off_norm);
    CHECK(off_soft < 1e-6, "softmax gives e^x / sum of e^x: off by %g", off_soft);
    CHECK(sum16((float[16]){1e8f, 1, 0, 0, 0, 0, 0, 0, -1e8f, 1}, NULL, 16) == 2,
          "sum16 adds element i and i + 8 first");
    memset(x, 0, sizeof x), x[5] = x[77] = 3;
    CHECK(argmax(x, 700) == 5, "of equal numbers argmax takes the first");
}

static void test_numbers(void) {
    test_halves();
    test_functions();
    test_hashes();
    test_arrays();
}

// ==== 2. Rounded numbers and matrix products =====================================================

static void test_quantize(void) {
    Quantized x = new_quantized(16, 96);
    own(x.q);
    float in[96];
    int wrong = 0, sums = 0;
    for (int round = 0; round < 3000; round++) {
        double size = ldexp(1, below(200) - 100);
        int token = below(16), n = round % 2 ? 96 : 65 + below(31);
        for (int i = 0; i < 96; i++) in[i] = (float)(size * spread());
        quantize(&x, token, in, n);
        for (int b = 0; b < 3; b++) {
            size_t at = round_at(token, b, 3);
            float most = 0, d = x.d[at];
            int sum = 0;
            for (int i = b * 32; i < b * 32 + 32 && i < n; i++) most = fmaxf(most, fabsf(in[i]));
            wrong += d != most / 127.0f;
            for (int i = 0; i < 32; i++) {  // what is behind the n numbers counts as zero
                int q = x.q[at * 32 + (size_t)i];
                float value = b * 32 + i < n ? in[b * 32 + i] : 0;
                wrong += q != (int)nearbyintf(value * (1.0f / d)) || q < -127 || q > 127;
                sum += q;
            }
            sums += x.dsum[at] != d * (float)sum || x.minus8[at] != -8 * sum;
        }
    }
    CHECK(!wrong, "activations become round(x / d), d = max|x| / 127: %d do not", wrong);
    CHECK(!sums, "each block's scaled sum is right: %d are not", sums);
    size_t at = round_at(1, 0, 1);
    for (int i = 0; i < 32; i++) in[i] = (float)(i - 16) + 0.5f;
    in[0] = 127, wrong = 0;
    quantize(&x, 1, in, 32);
    for (size_t i = 1; i < 32; i++) wrong += x.q[at * 32 + i] % 2 != 0;
    CHECK(x.d[at] == 1 && !wrong, "halves round to the even number");
    float odd[] = {0, -0.0f, 0x1p-149f, 126 * FLT_MIN, INFINITY, -INFINITY, NAN};
    for (int i = 0; i < 7; i++) {
        for (int j = 0; j < 32; j++) in[j] = j == 5 ? odd[i] : 0;
        quantize(&x, 1, in, 32);
        bool zero = i >= 4 || x.dsum[at] == 0;
        for (size_t j = 0; j < 32; j++) zero &= x.q[at * 32 + j] == 0;
        CHECK(zero && (i < 4 ? x.d[at] == 0 : isnan(x.d[at])), "a block with %g has scale %s",
              (double)odd[i], i < 4 ? "zero" : "NaN");
    }
    for (int j = 0; j < 32; j++) in[j] = 127 * FLT_MIN;
    quantize(&x, 1, in, 32);
    CHECK(x.d[at] == FLT_MIN && x.q[at * 32] == 127, "the smallest normal scale still counts");
    for (int j = 0; j < 32; j++) in[j] = j ? FLT_MAX / 3 : -FLT_MAX;
    quantize(&x, 1, in, 32);
    CHECK(x.q[at * 32] == -127 && x.q[at * 32 + 1] == 42, "the largest numbers quantize too");
}

// Two matrices, of which the other has another dtype, times 1 to 20 and 40 tokens: plain, and as
// matmul points, on one and three threads. Returns how many of the results differ.
enum { MOST_TOKENS = 40 };
static int differing(const Matrix *w, const Matrix *other, const float *x, float *y) {
    size_t size = (size_t)(w->rows + other->rows + 3) * MOST_TOKENS * sizeof(float);
    float *fast = get(size, 1);
    Quantized xq = new_quantized(MOST_TOKENS, w->cols);
    int differ = 0;
    for (int n = 1; n <= MOST_TOKENS; n += n < 20 ? 1 : MOST_TOKENS - 20)
        for (int threads = 1; threads <= 3; threads += 2) {
            set_threads(threads);
            memset(y, 0xff, size), memset(fast, 0xff, size);  // nor is more written
            size_t second = (size_t)w->rows * MOST_TOKENS + 1;
            matmul_plain((Product[]){{*w, y, 0, 0}, {*other, y + second, 0, 0}}, 2, x, &xq, n);
            matmul((Product[]){{*w, fast, 0, 0}, {*other, fast + second, 0, 0}}, 2, x, &xq, n);
            differ += memcmp(y, fast, size) != 0;
        }
    free(xq.q);
    set_threads(1);
    return differ;
}

static void test_product(int dtype, int rows, int cols) {
    Tensor t = matrix(dtype, rows, cols), u = matrix(dtype % Q4A + 1, 19, cols);
    Matrix w = {dtype, rows, cols, t.bytes}, other = {u.dtype, 19, cols, u.bytes};
    int wrong = 0;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) wrong += weight(&w, r, c) != t.values[r * cols + c];
    CHECK(!wrong, "weight() reads %s %d x %d: %d are wrong", formats[dtype], rows, cols, wrong);
    float *x = get((size_t)(MOST_TOKENS * cols), 4),
          *y = get((size_t)(MOST_TOKENS * (rows + 22)), 4);
    double *in = get((size_t)cols, 8), *out = get((size_t)rows, 8), worst = 0;
    for (int i = 0; i < MOST_TOKENS * cols; i++)
        x[i] = (float)(spread() * (i / cols == 4 ? 1e-20 : 1));
    int differ = differing(&w, &other, x, y);
    for (int i = 0; i < MOST_TOKENS; i++) {
        double size = 0;
        for (int c = 0; c < cols; c++)
            in[c] = (double)x[i * cols + c], size = worse(size, fabs(in[c]));
        times(out, &t, in);
        for (int r = 0; r < rows; r++)
            worst = worse(worst, fabs((double)y[i * rows + r] - out[r]) / size);
    }
    // Sums as large as they get: no partial sum may overflow.
    size_t scales = dtype == Q4A ? 64 : 32, block = scales + (dtype == Q8 ? 512 : 256);
    for (int sign = -1; sign <= 1 && dtype >= Q8; sign += 2) {
        for (size_t i = 0; i < t.n; i++)
            if (i % block >= scales) t.bytes[i] = dtype == Q8 ? (uint8_t)(sign * 127) : 0xff;
        for (int i = 0; i < MOST_TOKENS * cols; i++) x[i] = (float)sign;
        differ += differing(&w, &other, x, y);
    }
    CHECK(worst < (dtype >= Q8 ? 2e-5 : 1e-5), "%s %d x %d times x is right: off by %g",
          formats[dtype], rows, cols, worst);
    CHECK(!differ, "%s %d x %d: the fast product has the plain one's bits: %d differ",
          formats[dtype], rows, cols, differ);
}

static void test_products(void) {
    static const int rows[] = {1, 15, 16, 17, 33, 64, 130};
    static const int cols[] = {1, 2, 31, 32, 33, 50, 100, 2117};
    for (int dtype = ROWS; dtype <= Q4A; dtype++)
        for (int i = 0; i < 7; i++)
            for (int j = 0; j < 8; j++) if (j < 7 || i == 3) test_product(dtype, rows[i], cols[j]);
}

// ==== 3. Attention ===============================================================================

// A cache of random keys and values: sequence 0, and two branches that leave it at branch_at.
typedef struct { int head_dim, group, kv_heads, window, dtype, branch_at; } AttentionCase;
static const char *describe(const AttentionCase *a) {
    return text("head size %d, %d queries a head, window %d, %s, branch at %d", a->head_dim,
                a->group, a->window, formats[a->dtype], a->branch_at);
}

enum { CONTEXT = 640, LENGTH = 60 };  // positions of sequence 0, and of branches behind the place
// A number of the key (what = 0) or value (1) at a sequence's position: a function of its place,
// that a cache of this dtype holds exactly: in half precision, or rounded to int8, which finds this
// scale, a power of two, in the block.
static float stored(int dtype, int seq, int pos, int head, int d, int what) {
    uint64_t keep_state = random_state;
    random_state = (uint64_t)((((seq * 2048 + pos) * 8 + head) * 512 + d) * 2 + what) * 77;
    double x = spread();
    random_state = keep_state;
    if (dtype == BF16) return (float)half_value(nearest_half(x));
    if (dtype == F32) return (float)x;
    int q = d % 32 ? (int)(x * 32) : 127, which = pos * 3 + head + (what ? 0 : d / 32) + seq;
    return (float)(q < -127 ? -127 : q > 127 ? 127 : q) / (which % 4 ? 64 : 32);
}

static void fill_cache(Cache *kv, const AttentionCase *a) {
    for (int seq = 0; seq < 3; seq++) {
        int from = seq ? a->branch_at + (seq == 2) : 0, end = seq ? from + LENGTH : CONTEXT;
        if (seq) cache_branch(kv, 0, seq, from);
        for (int pos = from; pos < end; pos++) {
            Slot slot = {0, pos, seq, true};
            bool fresh = !*page_of(kv, seq, pos);
            cache_prepare(kv, &slot, 1);
            // What lies beside must not matter.
            if (fresh) memset(*page_of(kv, seq, pos), 0x55, kv->page_bytes);
            for (int h = 0; h < a->kv_heads; h++) {
                float k[256], v[256];
                for (int d = 0; d < a->head_dim; d++) {
                    k[d] = stored(a->dtype, seq, pos, h, d, 0);
                    v[d] = stored(a->dtype, seq, pos, h, d, 1);
                }
                cache_put(&(CacheHead){kv, seq, 1, h}, pos, k, v);
            }
        }
    }
}

// Head h of slot i against the second definition. Returns how far it is off.
static double attention_error(const AttentionCase *a, const Pass *f, int i, int h) {
    int hd = a->head_dim, pos = f->batch[i].pos, seq = f->batch[i].seq, kv_head = h / a->group;
    int from = seq ? a->branch_at + (seq == 2) : 0;
    double *keys = get((size_t)((pos + 1) * hd), 8), *values = get((size_t)((pos + 1) * hd), 8),
           *scales = get((size_t)pos + 1, 8), *q = get((size_t)hd, 8), *out = get((size_t)hd, 8);
    for (int t = 0; t <= pos; t++)
        for (int d = 0; d < hd; d++) {
            int owner = t < from ? 0 : seq;
            keys[t * hd + d] = (double)stored(a->dtype, owner, t, kv_head, d, 0);
            double v = values[t * hd + d] = (double)stored(a->dtype, owner, t, kv_head, d, 1);
            if (d == 0) scales[t] = fabs(v) / 127;  // the first number of int8 values is 127 scales
        }
    int first = a->window && pos >= a->window ? pos - a->window + 1 : 0;
    const float *given = f->s->att_out + (i * f->m->c.n_heads + h) * hd;
    for (int d = 0; d < hd; d++) q[d] = (double)f->s->q[given - f->s->att_out + d];
    const float *sinks = (const float *)(const void *)f->l->sinks.data;
    Heads seen_ = {keys, values, a->dtype == Q8 ? scales : NULL, hd, 1, hd,
                   (double)f->m->c.attn_cap, sinks ? sinks + h : NULL};
    average(out, q, &seen_, first, pos, (double)f->m->c.attn_scale);
    double worst = 0;
    for (int d = 0; d < hd; d++) worst = worse(worst, fabs(out[d] - (double)given[d]));
    return worst;
}

static void test_attention_case(const AttentionCase *a) {
    Model m = {.c = {.n_heads = a->group * a->kv_heads, .n_kv_heads = a->kv_heads,
                     .head_dim = a->head_dim, .n_layers = 2, .sliding_window = a->window,
                     .attn_scale = 0.4f, .dim = 1, .hidden_dim = 1, .vocab_size = 1,
                     .local_layers = {3}},
               .token_embedding = {.dtype = a->dtype}};
    Cache kv;
    cache_open(&kv, &m, CONTEXT, 3);
    fill_cache(&kv, a);
    // Runs of positions of all three sequences.
    int one = a->branch_at, two = one + 1, hd = a->head_dim, q_dim = m.c.n_heads * hd, n = 0;
    int starts[][3] = {{0, 0, 9}, {0, 14, 4}, {0, 250, 13}, {0, 509, 5}, {0, 623, 1},
                       {1, one, 20}, {1, one + 57, 3}, {2, two, 1}, {2, two + 16, 2}};
    Slot batch[MAX_BATCH];
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < starts[i][2]; j++)
            batch[n++] = (Slot){0, starts[i][1] + j, starts[i][0], true};
    State *s = get_state(&kv, 0);
    for (int i = 0; i < n * q_dim; i++)
        s->q[i] = a->dtype == Q8 ? stored(Q8, 3, i / hd, 0, i % hd, 0) : (float)spread();
    size_t size = (size_t)(n * q_dim) * sizeof(float);
    float *plain = get(size, 1), *q = s->q, *out = s->att_out;
    bool special = a->head_dim % 3 == 0;  // with sinks and a cap
    Tensor sinks = vector(m.c.n_heads, 1, 1);
    Layer l = {.sinks = {ROWS, 1, m.c.n_heads, special ? sinks.bytes : NULL}};
    m.c.attn_cap = special ? 1.5f : 0;
    Pass f = {.m = &m, .kv = &kv, .s = s, .batch = batch, .n = n, .layer = 1, .l = &l};
    attention_plain(&f);
    memcpy(plain, out, size);
    double worst = 0;
    for (int i = 0; i < n; i += 1 + i / 7)
        worst = worse(worst, attention_error(a, &f, i, below(m.c.n_heads)));
    CHECK(worst < 2e-5, "attention is the average of values by softmax(q k): off by %g (%s)", worst,
          describe(a));
    for (int threads = 1; threads <= 3; threads += 2)
        for (int pieces = 0; pieces < 3; pieces++) {  // all at once, or a few slots at a time
            set_threads(threads);
            memset(out, 0, size);
            for (int i = 0; i < n; i += f.n) {  // at the front of the arrays, as forward does
                f.n = pieces == 0 ? n : pieces == 1 ? 1 : 1 + below(9);
                if (f.n > n - i) f.n = n - i;
                f.batch = batch + i, s->q = q + i * q_dim, s->att_out = out + i * q_dim;
                attention(&f);
            }
            s->q = q, s->att_out = out;
            CHECK(!memcmp(plain, out, size), "fast attention has the plain one's bits (%s, "
                  "%d threads, cut %d)", describe(a), threads, pieces);
        }
    set_threads(1);
    cache_close(&kv);
}

static void test_attention(void) {
    static const int places[] = {0, 1, 15, 16, 17, 40, 255, 256, 257};
    static const int sizes[] = {2, 12, 16, 24, 64, 80, 130, 12, 16};
    static const int groups[] = {1, 3, 5, 2, 4, 9, 1, 40, 8};
    static const int windows[] = {0, 1, 7, 300, 16, 0, 257, 0, 100};
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 3; j++)
            test_attention_case(&(AttentionCase){sizes[i], groups[(i + j) % 9], 1 + i % 2,
                                                 windows[(i + 4 * j) % 9],
                                                 (int[]){BF16, F32, Q8}[j], places[i]});
    for (int many = 256; many < 258; many++)
        test_attention_case(&(AttentionCase){2, many, 1, 0, Q8, 17});
}

// ==== 4. forward, and the cache's pages ==========================================================

static int *random_ids(int n, int vocab) {
    int *ids = get((size_t)n, sizeof *ids);
    for (int i = 0; i < n; i++) ids[i] = below(vocab);
    return ids;
}
static const char *name_of(const Made *made) {
    return text("%s %s", made->s.name, formats[made->s.dtype]);
}
// Logits of all positions of ids (n), in a cache of their own: at once, or one token after the
// other and plain.
static float *fresh_logits(const Model *m, const int *ids, int n) {
    size_t bytes = (size_t)(n * m->c.vocab_size) * sizeof(float);
    Slot *batch = get((size_t)n, sizeof *batch);
    for (int i = 0; i < n; i++) batch[i] = (Slot){ids[i], i, 0, true};
    Cache kv;
    cache_open(&kv, m, n, 1);
    float *logits = memcpy(get(bytes, 1), forward(m, &kv, batch, n), bytes);
    cache_close(&kv);
    return logits;
}
static float *plain_logits(const Model *m, const int *ids, int n) {
    size_t row = (size_t)m->c.vocab_size;
    float *logits = get((size_t)n * row, sizeof(float));
    Cache kv;
    Matmul *fast_matmul = matmul;
    void (*fast_attention)(const Pass *) = attention;
    matmul = matmul_plain, attention = attention_plain;
    cache_open(&kv, m, n, 1);
    for (int i = 0; i < n; i++)
        memcpy(logits + (size_t)i * row, forward(m, &kv, &(Slot){ids[i], i, 0, true}, 1), row * 4);
    cache_close(&kv);
    matmul = fast_matmul, attention = fast_attention;
    return logits;
}

static void test_against_reference(const Made *made, const Model *m) {
    enum { N = 80 };
    int vocab = made->s.vocab, *ids = random_ids(N, vocab);
    double *expected = get((size_t)(N * vocab), 8), worst = 0, mean = 0, square = 0;
    const float *logits = fresh_logits(m, ids, N);
    reference(made, ids, N, expected, NULL);
    for (int i = 0; i < N * vocab; i++) {
        double error = fabs((double)logits[i] - expected[i]);
        worst = worse(worst, error), mean += error / (N * vocab),
        square += expected[i] * expected[i] / (N * vocab);
    }
    // A quantized activation may fall to the other side of a rounding step: rare, small, not zero.
    bool quantized = made->s.dtype >= Q8;
    bool exact = made->s.embedding == F32 || made->s.embedding == ROWS;  // and the cache is float32
    double tolerance = quantized ? 0.15 : exact ? 2e-4 : 2e-2;
    CHECK(worst < tolerance && mean < (exact ? 2e-3 : 2e-2) && (quantized || mean < 1e-3),
          "%s computes what the second transformer does: off by %g, on average %g (size %g)",
          name_of(made), worst, mean, sqrt(square));
}

// The logits of every position do not depend on how the work is cut and dealt out. Sequences 1 and
// 2 are there to be in the way.
static void test_batches(const Made *made, const Model *m) {
    enum { N = 300 };
    size_t vocab = (size_t)m->c.vocab_size;
    int *ids = random_ids(N, m->c.vocab_size), *others = random_ids(2 * N, m->c.vocab_size);
    float *expected = plain_logits(m, ids, N);
    for (int round = 0; round < 5; round++) {
        Cache kv;
        int at[3] = {0}, wrong = 0, most_tokens[] = {150, 1, 150, 5, 2 * N};
        cache_open(&kv, m, N, 3);
        set_threads(round % 2 ? 3 : 1);
        while (at[0] < N) {
            Slot batch[2 * N];
            int n = 0, most = 1 + below(most_tokens[round]), wanted = 0, positions[2 * N];
            while (n < most && at[0] < N) {
                int seq = round ? below(3) : 0, run = 1 + below(20);
                for (; run-- && n < most && at[seq] < N; at[seq]++) {
                    bool want = below(3) > 0;
                    if (want) positions[wanted++] = seq ? -1 : at[0];
                    batch[n++] = (Slot){seq ? others[(seq - 1) * N + at[seq]] : ids[at[0]], at[seq],
                                        seq, want};
                }
            }
            const float *logits = forward(m, &kv, batch, n);
            for (int i = 0; i < wanted; i++)
                wrong += positions[i] >= 0 &&
                         memcmp(logits + (size_t)i * vocab,
                                expected + (size_t)positions[i] * vocab, vocab * sizeof(float));
        }
        cache_close(&kv);
        CHECK(!wrong, "%s: the same logits however the batch is cut, %d threads: %d differ",
              name_of(made), round % 2 ? 3 : 1, wrong);
    }
    set_threads(1);
}

// Three sequences that begin with the same `place` tokens compute what each does alone, though they
// share the pages of their beginning; the first of them is the one that they branch from.
enum { EXTRA = 34, MOST_PLACES = 300 };
static void test_branches(const Made *made, const Model *m, int place) {
    int vocab = m->c.vocab_size, ids[3][MOST_PLACES + EXTRA], wrong = 0, ctx = place + EXTRA;
    float *expected[3];
    Cache kv;
    for (int s = 0; s < 3; s++) {
        for (int i = 0; i < ctx; i++) ids[s][i] = s && i < place ? ids[0][i] : below(vocab);
        expected[s] = fresh_logits(m, ids[s], ctx);
    }
    cache_open(&kv, m, ctx, 3);
    set_threads(place % 2 ? 1 : 3);
    prefill(m, &kv, 0, ids[0], 0, place);
    cache_branch(&kv, 0, 1, place), cache_branch(&kv, 1, 2, place);
    for (int from = place, to; from < ctx; from = to) {
        Slot batch[3 * EXTRA];
        int n = 0;
        to = from + 1 + below(12);
        if (to > ctx) to = ctx;
        for (int s = 0; s < 3; s++)
            for (int j = from; j < to; j++) batch[n++] = (Slot){ids[s][j], j, s, true};
        const float *logits = forward(m, &kv, batch, n);
        for (int s = 0; s < 3; s++, logits += (to - from) * vocab)
            wrong += memcmp(logits, expected[s] + from * vocab,
                            (size_t)((to - from) * vocab) * sizeof(float)) != 0;
    }
    CHECK(!wrong, "%s: branches at %d compute what sequences of their own do: %d parts differ",
          name_of(made), place, wrong);
    set_threads(1);
    cache_close(&kv);
}

// What else can be done with pages: positions written again, sequences emptied and used again.
static void test_pages(const Made *made, const Model *m) {
    enum { N = 520 };
    int *ids = random_ids(N, m->c.vocab_size), *others = random_ids(N, m->c.vocab_size);
    size_t row = (size_t)m->c.vocab_size * sizeof(float), vocab = (size_t)m->c.vocab_size;
    float *expected = fresh_logits(m, ids, N), *other = fresh_logits(m, others, N);
    Cache kv;
    cache_open(&kv, m, N, 3);
    prefill(m, &kv, 0, others, 0, N);
    const uint8_t *first = *page_of(&kv, 0, 0), *second = *page_of(&kv, 0, 256);
    CHECK(!memcmp(prefill(m, &kv, 0, ids, 0, 270), expected + 269 * vocab, row),
          "%s: positions may be written again", name_of(made));
    cache_branch(&kv, 0, 1, 260);
    CHECK(!memcmp(prefill(m, &kv, 1, ids, 260, N), expected + (N - 1) * vocab, row) &&
              *page_of(&kv, 1, 0) == first && *page_of(&kv, 1, 256) != second,
          "%s: a branch copies the page that it writes to, and no other", name_of(made));
    CHECK(!*page_of(&kv, 2, 0), "a sequence that was not written has no pages");
    cache_branch(&kv, 1, 2, N);
    prefill(m, &kv, 1, others, 0, N);
    CHECK(!memcmp(prefill(m, &kv, 2, ids, N - 1, N), expected + (N - 1) * vocab, row),
          "%s: a branch is as it was when what it came from is written anew", name_of(made));
    cache_clear(&kv, 1);
    CHECK(!*page_of(&kv, 1, 0) && *page_of(&kv, 2, 0) == first,
          "clearing a sequence gives its pages back, but what others share stays");
    CHECK(!memcmp(prefill(m, &kv, 1, others, 0, N), other + (N - 1) * vocab, row) &&
              !memcmp(prefill(m, &kv, 2, ids, N - 1, N), expected + (N - 1) * vocab, row),
          "%s: a sequence can be used again after it was cleared", name_of(made));
    cache_close(&kv);
}

static void test_forward(void) {
    static const int places[] = {0, 1, 15, 16, 17, 40, 255, 256, 257};
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= ASSORTED; dtype++) {
            Shape s = family(which, dtype);
            if ((which + dtype) % 2) s.embedding = F32;  // then the cache is float32 too
            Made made = make_weights(&s);
            Model m = open_made(&made, "forward.bin");
            test_against_reference(&made, &m);
            if (which == LLAMA || which == GEMMA || dtype == F32 + which) test_batches(&made, &m);
            if (which == QWEN3) test_pages(&made, &m);
            for (int i = 0; i < 9; i++)
                if ((i + which * 5 + dtype) % 4 == 0 || (which == GEMMA && dtype <= BF16))
                    test_branches(&made, &m, places[i]);
            free_model(&m);
        }
    for (int i = 0; i < 4; i++) {
        int version = i / 2, tied = i % 2;
        Shape s = family(LLAMA, ROWS);
        s.name = version ? "version 1" : "version 0", s.features = tied ? TIED : 0;
        Made made = make_weights(&s);
        Buffer b = llama2c_file(&made, version);
        Model m;
        load_model(&m, keep("llama2c.bin", &b));
        CHECK((m.classifier.data == m.token_embedding.data) == tied,
              "%s knows whether it is tied", s.name);
        test_against_reference(&made, &m);
        if (tied == version) test_batches(&made, &m);
        test_branches(&made, &m, 17);
        free_model(&m);
    }
}

// ==== 5. The sampler =============================================================================

// llama2.c's rule in its own words: a coin in [0, 1) from xorshift*; without top-p, the first token
// at which the running sum of probabilities exceeds the coin; with it, the same over the likeliest
// tokens, the fewest whose sum exceeds top_p, with the coin scaled to that sum. *margin: how near
// the decision was.
static int draw(const double *p, int n, const Sampler *s, double coin, double *margin) {
    double top_p = (double)s->top_p, min_p = (double)s->min_p, sum = 0, cdf = 0;
    int order[400], used = n;
    bool nucleus = top_p > 0 && top_p < 1, sorted = nucleus || s->top_k || min_p > 0;
    for (int i = 0; i < n; i++) {
        int j = i;
        for (; sorted && j && p[order[j - 1]] < p[i]; j--) order[j] = order[j - 1];
        order[j] = i;
    }
    *margin = 1;
    if (s->top_k && used > s->top_k) used = s->top_k;
    if (s->top_k) top_p *= 0;
    for (int i = 0; i < used && s->top_k; i++) top_p += (double)s->top_p * p[order[i]];
    for (int i = 0; i < used && sorted; i++) {
        double p_i = p[order[i]], least = min_p * p[order[0]];
        if (min_p > 0 && i) *margin = fmin(*margin, fabs(p_i - least));
        if (min_p > 0 && i && p_i < least) used = i;
        else {
            sum += p_i;
            if (nucleus) *margin = fmin(*margin, fabs(sum - top_p));
            if (nucleus && sum > top_p) used = i + 1;
        }
    }
    double r = sorted ? coin * sum : coin;
    for (int i = 0; i < used; i++) {
        cdf += p[order[i]];
        *margin = fmin(*margin, fabs(r - cdf));
        if (r < cdf) return order[i];
    }
    return order[used - 1];
}

static Sampler sampler_for(int n, double temperature, double top_p, uint64_t seed) {
    return (Sampler){.temperature = (float)temperature, .top_p = (float)top_p, .repeat_penalty = 1,
                     .rng = seed, .vocab_size = n, .p = get((size_t)n, sizeof(float)),
                     .candidates = get((size_t)n, sizeof(Candidate))};
}

static void test_draws(double temperature, double top_p, int top_k, double min_p) {
    enum { N = 200, DRAWS = 400 };
    float logits[N];
    double p[N];
    int wrong = 0, close = 0;
    Sampler s = sampler_for(N, temperature, top_p, 1);
    s.top_k = top_k, s.min_p = (float)min_p;
    for (int i = 0; i < DRAWS; i++) {
        uint64_t state = s.rng = i ? 1 + rnd() % 1000000 : UINT64_MAX;
        for (int step = 0; step < 3; step++) {
            double most = -1e9, sum = 0, margin;
            for (int j = 0; j < N; j++) logits[j] = (float)(3 * spread());
            for (int j = 0; j < N; j++) most = worse(most, (double)logits[j]);
            for (int j = 0; j < N; j++) sum += p[j] = exp(((double)logits[j] - most) / temperature);
            for (int j = 0; j < N; j++) p[j] /= sum;
            state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
            double coin = (double)(uint32_t)(state * 0x2545F4914F6CDD1Du >> 32 >> 8) / 16777216;
            int expected = draw(p, N, &s, coin, &margin), got = sample(&s, logits, NULL, 0);
            if (margin < 2e-6) close++;
            else wrong += got != expected;
        }
    }
    CHECK(!wrong && close < DRAWS / 4,
          "draws at temperature %g, top-p %g, top-k %d, min-p %g are llama2.c's: "
          "%d of %d are not",
          temperature, top_p, top_k, min_p, wrong, 3 * DRAWS);
}

// How many of 500 draws are not the tokens from 0 to most.
static int beyond(Sampler *s, const float *logits, int most) {
    int n = 0;
    for (int i = 0; i < 500; i++) n += sample(s, logits, NULL, 0) > most;
    return n;
}

static void test_limits(void) {
    float logits[100] = {0};
    Sampler s = sampler_for(100, 0, 0.9, 7);
    logits[40] = logits[41] = logits[99] = 2;
    CHECK(sample(&s, logits, NULL, 0) == 40 && s.rng == 7,
          "temperature 0 takes the likeliest, of ties the lowest");
    CHECK(!memcmp(s.p, logits, sizeof logits), "and leaves the logits in p, which explain shows");
    s.temperature = 1e-10f;
    int others = 0;
    logits[41] = logits[99] = 1.999f;
    for (int i = 0; i < 500; i++) others += sample(&s, logits, NULL, 0) != 40;
    CHECK(!others, "temperature 1e-10 takes the likeliest too");
    for (int i = 0; i < 100; i++) logits[i] = 0.5f;
    s.temperature = 1, s.top_p = 1e-6f;
    CHECK(!beyond(&s, logits, 0), "a tiny top-p of a uniform distribution leaves the first token");
    s.top_p = 1, s.top_k = 3;
    CHECK(!beyond(&s, logits, 2), "of equal tokens top-k takes the lowest ids");
    s.top_k = 1000;
    CHECK(beyond(&s, logits, 50) > 150, "a top-k beyond the vocabulary is off");
}

static void test_repeat_penalty(void) {
    int text_so_far[] = {3, 3, 7};
    float logits[100];
    Sampler s = sampler_for(100, 0, 1, 1);
    for (int i = 0; i < 100; i++) logits[i] = -5;
    logits[3] = 2, logits[4] = 1.5f, logits[7] = -1;
    s.repeat_penalty = 1.3f;
    CHECK(sample(&s, logits, text_so_far, 3) == 3,
          "a repetition is counted once: 2 / 1.3 is above 1.5");
    s.repeat_penalty = 1.5f;
    CHECK(sample(&s, logits, text_so_far, 3) == 4,
          "a repeated token with a positive logit is divided");
    logits[3] = logits[4] = -5, logits[8] = -1.4f;
    CHECK(sample(&s, logits, text_so_far, 3) == 8,
          "a repeated token with a negative logit is multiplied");
    s.repeat_last = 2, logits[3] = 3;
    CHECK(sample(&s, logits, (int[]){3, 8, 7}, 3) == 3, "tokens before the last ones are not");
    s.repeat_penalty = 1, logits[3] = -5;
    CHECK(sample(&s, logits, text_so_far, 3) == 7, "a penalty of 1 is off");
    logits[1] = 2, logits[2] = 2 - 1.7f, logits[3] = 2 - 1.8f;
    int again[] = {9, 5, 6, 4, 1, 0, 5, 6, 4}, other[] = {5, 6, 4, 1, 0, 6, 6, 4};
    s.dry = 1;
    CHECK(sample(&s, logits, again, 9) == 2, "what followed three tokens loses 1.75");
    s.dry = 1.05f;
    CHECK(sample(&s, logits, again, 9) == 2 && sample(&s, logits, other, 8) == 1,
          "what followed two tokens loses less");
    CHECK(sample(&s, logits, again, 2) == 1, "what did not occur loses nothing");
}

// What a tokenizer's file recommends holds in a chat, where the command line says nothing else.
static void test_recommended(void) {
    Model m = {.c.vocab_size = 9};
    Tokenizer t = {.h = {.temperature = 0, .top_p = 0.5f, .top_k = 7, .min_p = 0.25f,
                         .repeat_penalty = 1.5f}};
    const Options usual = {.mode = "chat", .temperature = -1, .top_p = -1, .top_k = -1,
                           .min_p = -1, .repeat_penalty = -1};
    Options o = usual;
    for (int i = 0; i < 4; i++) {
        const char *says[] = {"0 0.5 7 0.25 1.5", "1 0.9 0 0 1", "0.75 1 0 0 1",
                              "0 0.5 0 0.25 1.5"};
        if (i == 1) o.mode = "generate";
        if (i == 2) o = (Options){.mode = "chat", .temperature = 0.75, .top_p = 1,
                                  .repeat_penalty = 1};
        if (i == 3) o = usual, t.h.top_k = -1;
        Sampler s = sampler_new(&o, &m, &t);
        const char *found = text("%g %g %d %g %g", (double)s.temperature, (double)s.top_p, s.top_k,
                                 (double)s.min_p, (double)s.repeat_penalty);
        CHECK(!strcmp(found, says[i]), "sampling is %s, not %s", found, says[i]);
    }
}

static void test_sampler(void) {
    test_recommended();
    static const double temperatures[] = {0.3, 0.8, 1, 2}, top_ps[] = {0, 0.1, 0.5, 0.9, 0.99, 1};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 6; j++) test_draws(temperatures[i], top_ps[j], 0, 0);
    for (int k = 1; k < 40; k += 6) test_draws(1, k % 4 ? 0.95 : 1, k, 0);
    test_draws(1, 1, 0, 0.05), test_draws(0.7, 0.9, 0, 0.2), test_draws(1.5, 0.9, 20, 0.01),
        test_draws(1, 0, 0, 1);
    test_limits();
    test_repeat_penalty();
}

// ==== 6. The tokenizer ===========================================================================

enum { BYTE_LEVEL = 0, SENTENCEPIECE = BY_SCORE | CHARACTERS };
typedef struct {
    int bos, eos, unk, flags;
    float temperature, top_p;
    int n, n_merges, n_added, n_ranges, n_elements, n_steps, n_marks, n_forms, n_stops, n_chat;
    Buffer tokens, added, elements, steps, merges, ranges, marks, forms, stops, chat;
    char texts[2000][12];  // the first bytes of each token
    int lens[2000];
    float scores[2000];
} Vocabulary;

static void step(Vocabulary *v, int kind, int how, const char *from, const char *to) {
    Step made = {.kind = (uint8_t)kind, .how = (uint8_t)how, .n_from = (uint8_t)strlen(from),
                 .n_to = (uint8_t)strlen(to)};
    memcpy(made.from, from, made.n_from), memcpy(made.to, to, made.n_to);
    if (kind == SPLIT) made.element = (uint32_t)v->n_elements;
    put(&v->steps, &made, sizeof made);
    v->n_steps++;
}
static Vocabulary *new_vocabulary(int flags) {
    Vocabulary *v = get(1, sizeof *v);
    v->flags = flags, v->bos = v->eos = v->unk = -1, v->temperature = v->top_p = -1;
    step(v, FIND, 0, "", "");
    return v;
}
static void added(Vocabulary *v, int id, const char *s, size_t len, int flags) {
    put32(&v->added, id);
    put(&v->added, (uint8_t[]){(uint8_t)flags, 0, (uint8_t)len, (uint8_t)(len >> 8)}, 4);
    put(&v->added, s, len);
    v->n_added++;
}
static int token(Vocabulary *v, const char *s, size_t len, double score, int type) {
    v->scores[v->n] = (float)score;
    put(&v->tokens, &v->scores[v->n], 4);
    put(&v->tokens, (uint8_t[]){(uint8_t)type, 0, (uint8_t)len, (uint8_t)(len >> 8)}, 4);
    put(&v->tokens, s, len);
    memcpy(v->texts[v->n], s, len < 12 ? len : 12);
    v->lens[v->n] = (int)len;
    if (type == CONTROL || type == USER_DEFINED)
        added(v, v->n, s, len, type == CONTROL ? ONLY_UNTYPED : 0);
    return v->n++;
}
static int word(Vocabulary *v, const char *s, int type) { return token(v, s, strlen(s), 0, type); }
static void all_bytes(Vocabulary *v) {
    for (int i = 0; i < 256; i++) token(v, &(char){(char)i}, 1, 0, v->flags ? BYTE : NORMAL);
}
static void merge(Vocabulary *v, int a, int b) {
    put32(&v->merges, a), put32(&v->merges, b);
    v->n_merges++;
}

// Atoms of the tests' characters: 0 others, 1 letters, 2 numbers, 3 white space but 4, a space, and
// 5, \r and \n; from 6 on the characters of `singles`. A set by its letter in a pattern: (L)etters,
// (N)umbers, (W)hite space, (S) what is none, (O)ther than these, (B) what may stand before a word,
// new lines (R); a small letter is that character, also as a capital with `fold`.
static const char singles[] = "'strevmldSTREVMLD";
static uint64_t set_of(char c, bool fold) {
    uint64_t letters = 2, white = 8 | 16 | 32, all = (1ull << (6 + sizeof singles)) - 1, set = 0;
    for (int i = 1; singles[i]; i++) letters |= 64ull << i;
    for (int i = 0; singles[i]; i++)
        if (singles[i] == c || (fold && (singles[i] | 32) == c)) set |= 64ull << i;
    switch (c) {
    case 'L': set = letters; break;
    case 'N': set = 4; break;
    case 'W': set = white; break;
    case 'S': set = all & ~white; break;
    case 'O': set = all & ~white & ~letters & ~4ull; break;
    case 'B': set = all & ~letters & ~36ull; break;
    case 'R': set = 32; break;
    case ' ': set = 16; break;
    }
    return set;
}
// A step that cuts by a pattern: alternatives of sets with ?, *, +, 3 (one to three), & (+, gives
// nothing back); ! or = before one only looks at it.
static void split(Vocabulary *v, int how, const char *pattern, bool fold) {
    step(v, SPLIT, how, "", "");
    for (const char *p = pattern, *bar; *p; p = *bar ? bar + 1 : bar) {
        bar = p + strcspn(p, "|");
        for (bool first = true; p < bar; first = false) {
            int kind = *p == '!' ? NOT_FOLLOWED : *p == '=' ? FOLLOWED : TAKE;
            p += kind != TAKE;
            Element x = {.set = set_of(*p++, fold), .least = 1, .most = 1, .kind = (uint16_t)kind};
            if (p < bar && strchr("?*+3&", *p)) {
                x.least = *p == '+' || *p == '3' || *p == '&';
                x.most = *p == '?' ? 1 : *p == '3' ? 3 : UINT32_MAX;
                if (*p++ == '&') x.kind = TAKE_ALL;
            }
            int rest = 0, here = ++v->n_elements;
            for (const char *q = p; q < bar; q++) rest += !strchr("?*+3&!=", *q);
            x.next = (uint16_t)(rest ? here : 0);
            x.otherwise = (uint16_t)(first && *bar ? here + rest : 0);
            put(&v->elements, &x, sizeof x);
        }
    }
}
static const char gpt2_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?O+|W+!S|W+";
static const char cl100k_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d|B?L+|N3| ?O+R*|W*R+|W+!S|W+";
static void some_ranges(Vocabulary *v) {
    static const uint32_t ranges[][3] = {
        {9, 13, 3}, {10, 10, 5}, {13, 13, 5}, {32, 32, 4}, {48, 57, 2}, {65, 90, 1}, {97, 122, 1},
        {0x85, 0x85, 3}, {0xa0, 0xa0, 3}, {0xb2, 0xb3, 2}, {0xc0, 0xd6, 1}, {0xd8, 0xf6, 1},
        {0xf8, 0x2c1, 1}, {0x400, 0x481, 1}, {0x660, 0x669, 2}, {0x3000, 0x3000, 3},
        {0x4e00, 0x9fff, 1}};
    put(&v->ranges, ranges, sizeof ranges);
    v->n_ranges = (int)(sizeof ranges / sizeof *ranges);
    for (int i = 0; singles[i]; i++, v->n_ranges++)
        put32(&v->ranges, singles[i]), put32(&v->ranges, singles[i]), put32(&v->ranges, 6 + i);
}
static void chat_piece(Vocabulary *v, const char *s, int flags) {
    put32(&v->chat, (int)strlen(s) + !!(flags & DATE)), put32(&v->chat, flags);
    put(&v->chat, s, strlen(s) + !!(flags & DATE));
    v->n_chat++;
}
static void chat_format(Vocabulary *v, const char *const *pieces, const int *flags) {
    for (int i = 0; i < N_CHAT; i++) chat_piece(v, pieces[i], flags[i]);
}
static Buffer tokenizer_file(const Vocabulary *v) {
    Buffer b = {0};
    int head[] = {0x346b6f74, 1, 0, 0, v->n, v->bos, v->eos, v->unk, v->flags, v->n_merges,
                  v->n_added, v->n_ranges, v->n_elements, v->n_steps, v->n_marks, v->n_forms,
                  v->n_stops, v->n_chat};
    uint64_t sets[] = {set_of('W', false), set_of('L', false) | set_of('N', false)};  // white, word
    put(&b, head, sizeof head);
    put(&b, &v->temperature, 4), put(&b, &v->top_p, 4), put(&b, NULL, 16);  // 0: no top-k, ...
    put(&b, sets, sizeof sets);
    put(&b, v->tokens.p, v->tokens.n);
    if (v->added.n) put(&b, v->added.p, v->added.n);
    align(&b, 8);
    const Buffer *rest[] = {&v->elements, &v->steps, &v->merges, &v->ranges, &v->marks, &v->forms,
                            &v->stops, &v->chat};
    for (int i = 0; i < 8; i++) if (rest[i]->n) put(&b, rest[i]->p, rest[i]->n);
    set64(b.p + 8, hash64(b.p + 16, b.n - 16));
    return b;
}
static Tokenizer open_tokenizer(const Vocabulary *v, const char *name) {
    Buffer b = tokenizer_file(v);
    Tokenizer t;
    static Model m;
    static Header h;
    h.tokenizer_hash = get64(b.p + 8), m = (Model){.c.vocab_size = v->n, .header = &h};
    const char *wrong = load_tokenizer(&t, keep(name, &b), &m);
    if (!CHECK(!wrong, "a tokenizer made here opens: it %s", wrong)) exit(1);
    return t;
}

static Ids ids_of(const Tokenizer *t, const char *s, size_t n, const char *typed, bool bos) {
    Ids ids = {0};
    encode(t, (Text){s, n}, typed, bos, &ids);
    own(resize(ids.ids, ids.n + 1, sizeof *ids.ids));
    return (Ids){held[n_held - 1], ids.n, ids.n + 1};
}
// The ids of a text as a string, for comparing and for showing.
static const char *shown(const Tokenizer *t, const char *s, const char *typed, bool bos) {
    Ids ids = ids_of(t, s, strlen(s), typed, bos);
    Buffer b = bytes_of("", 0);
    for (size_t i = 0; i < ids.n; i++) put_text(&b, text(i ? " %d" : "%d", ids.ids[i]));
    return (char *)b.p;
}
static Buffer decoded(const Tokenizer *t, const int *ids, size_t n) {
    Buffer b = bytes_of("", 0);
    for (size_t i = 0; i < n; i++) {
        Text piece = decode(t, i ? ids[i - 1] : -1, ids[i]);
        put(&b, piece.s, piece.len);
    }
    return b;
}
static bool round_trips(const Tokenizer *t, const char *s, size_t n) {
    Ids ids = ids_of(t, s, n, NULL, false);
    Buffer b = decoded(t, ids.ids, ids.n);
    return b.n == n && !memcmp(b.p, s, n);
}

// Words as the regular expressions of GPT-2 and cl100k cut them; the bars were checked with a
// regular expression library. Every expected word is a token, taken whole: a wrong cut shows.
static void test_words(void) {
    static const char *const cases[14][3] = {  // by three rules; NULL: as by the one before
        {"we|'ve| it|'s| I|'|LL| CAN|'|T| '|tis| o|'|clock", 0,
         "we|'ve| it|'s| I|'LL| CAN|'T| '|tis| o|'clock"},
        {" | two| | spaces|  | and|\t|tab| \n\n|\n|lines|  \n", 0,
         " | two| | spaces|  | and|\ttab| \n\n\n|lines|  \n"},
        {"1234567| x|1|y| 12|ab", "1|2|3|4|5|6|7| x|1|y| |1|2|ab", "123|456|7| x|1|y| |12|ab"},
        {"caf\xc3\xa9| n\xc3\xa4|\xc2\xa0|\xc2\xa0|\xd1\x81\xd0\xbb| \xe4\xb8\xad\xe6\x96\x87|!?",
         0,
         "caf\xc3\xa9| n\xc3\xa4|\xc2\xa0|\xc2\xa0\xd1\x81\xd0\xbb| \xe4\xb8\xad\xe6\x96\x87|!?"},
        {"...!!|\r\n\r\n | end|\r\n", 0, "...!!\r\n\r\n| | end|\r\n"},
        {" '|S|''|ve|'re|'re| '|llama"},
        {"a|\xe3\x80\x80|b| \xe3\x80\x80| c|\xd9\xa1\xd9\xa2| \xd9\xa1",
         "a|\xe3\x80\x80|b| \xe3\x80\x80| c|\xd9\xa1|\xd9\xa2| |\xd9\xa1",
         "a|\xe3\x80\x80" "b| \xe3\x80\x80| c|\xd9\xa1\xd9\xa2| |\xd9\xa1"},
        {"--|x|\n\n| --|\n| x", 0, "--|x|\n\n| --\n| x"}, {"\n"}, {" "},
        {"x| | 1| | 2| !", "x|  |1|  |2| !", "x| | |1| | |2| !"},
        {"a|\xff\xe0\x81\x81\xc3| b|\x80"}, {"'|quoted|'", 0, "'quoted|'"},
        {"'ll|'d|'|LLama|'", 0, "'ll|'d|'LL|ama|'"}};
    for (int rule = 0; rule < 3; rule++) {
        Vocabulary *v = new_vocabulary(BYTE_LEVEL);
        if (rule == 1) split(v, 15, "N", false);
        split(v, 15, rule == 2 ? cl100k_pattern : gpt2_pattern, rule == 2);
        all_bytes(v);
        v->flags = IGNORE_MERGES;
        some_ranges(v);
        const char *words[14];
        for (int i = 0; i < 14; i++) {
            int from = rule;
            while (!cases[i][from]) from--;
            words[i] = cases[i][from];
            for (const char *p = words[i], *end; *p; p = end + (*end == '|')) {
                end = p + strcspn(p, "|");
                if (end - p > 1) token(v, p, (size_t)(end - p), 0, NORMAL);
            }
        }
        Tokenizer t = open_tokenizer(v, "words.tok");
        for (int i = 0; i < 14; i++) {
            Buffer joined = {0}, cut = {0};
            for (const char *p = words[i]; *p; p++) if (*p != '|') put(&joined, p, 1);
            Ids ids = ids_of(&t, (char *)joined.p, joined.n, NULL, true);
            for (size_t j = 0; j < ids.n; j++) {
                if (j) put_text(&cut, "|");
                put(&cut, t.tokens[ids.ids[j]].text.s, t.tokens[ids.ids[j]].text.len);
            }
            CHECK(is_text(&cut, words[i]), "rule %d cuts %s as it should: %s", rule, words[i],
                  cut.p);
        }
        free_tokenizer(&t);
    }
}

// Byte pair encoding by its definition: the best neighbours are joined, of equals the leftmost.
static void naive_bpe(const Vocabulary *v, const char *s, int n, Ids *out) {
    int list[200], len = 0;
    for (int i = 0; i < n; i++)
        for (int id = 0; id < v->n; id++)
            if (v->lens[id] == 1 && v->texts[id][0] == s[i]) { list[len++] = id; break; }
    for (;;) {
        int at = -1, joined = -1;
        double best = -1e9;
        for (int i = 0; i + 1 < len; i++) {
            char both[24];
            int a = list[i], b = list[i + 1], size = v->lens[a] + v->lens[b], id = 0;
            if (size > 12) continue;
            memcpy(both, v->texts[a], (size_t)v->lens[a]);
            memcpy(both + v->lens[a], v->texts[b], (size_t)v->lens[b]);
            while (id < v->n && (v->lens[id] != size || memcmp(v->texts[id], both, (size_t)size)))
                id++;
            if (id == v->n) continue;
            double priority = v->flags == BYTE_LEVEL ? -1e9 : (double)v->scores[id];
            for (int k = v->n_merges; k--;)
                if ((int)read_u32(v->merges.p + 8 * k) == a &&
                    (int)read_u32(v->merges.p + 8 * k + 4) == b) priority = -k;
            if (priority > best) best = priority, at = i, joined = id;
        }
        if (at < 0) break;
        list[at] = joined;
        memmove(list + at + 1, list + at + 2, (size_t)(len-- - at - 2) * sizeof *list);
    }
    for (int i = 0; i < len; i++) push(out, list[i]);
}

// Adds random joinings of what is there.
static void random_merges(Vocabulary *v, const char *letters, int n) {
    int have[300], known = 0;
    for (int i = 0; i < v->n; i++)
        if (v->lens[i] == 1 && v->texts[i][0] && strchr(letters, v->texts[i][0])) have[known++] = i;
    while (n) {
        int a = have[below(known)], b = have[below(known)], size = v->lens[a] + v->lens[b];
        char both[24];
        bool there = size > 12;
        memcpy(both, v->texts[a], (size_t)v->lens[a]);
        memcpy(both + v->lens[a], v->texts[b], (size_t)v->lens[b]);
        for (int i = 0; i < v->n && !there; i++)
            there = v->lens[i] == size && !memcmp(v->texts[i], both, (size_t)size);
        if (there) continue;
        have[known++] = token(v, both, (size_t)size, -(double)below(12), NORMAL);
        if (v->flags == BYTE_LEVEL) merge(v, a, b);
        n--;
    }
}
static void test_naive(const Vocabulary *v, const Tokenizer *t, const char *letters) {
    int wrong = 0;
    for (int i = 0; i < 1500; i++) {
        char s[200];
        int n = 1 + below(i % 50 ? 30 : 190);
        for (int j = 0; j < n; j++) s[j] = letters[below((int)strlen(letters))];
        Ids got = ids_of(t, s, (size_t)n, NULL, false), expected = {0};
        naive_bpe(v, s, n, &expected);
        wrong += got.n != expected.n || memcmp(got.ids, expected.ids, got.n * sizeof(int));
        free(expected.ids);
    }
    CHECK(!wrong,
          "%s joins the best neighbours first, then the leftmost: %d of 1500 texts are wrong",
          v->flags ? "SentencePiece BPE" : "byte-level BPE", wrong);
}

static void test_byte_level(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    all_bytes(v);
    random_merges(v, "abc \xc3\xa9", 80);
    Tokenizer t = open_tokenizer(v, "bytes.tok");
    test_naive(v, &t, "abc \xc3\xa9");
    free_tokenizer(&t);
    for (int rule = 0; rule < 4; rule++) {
        v->n_steps = 0, v->steps.n = 0, v->n_elements = 0, v->elements.n = 0;
        if (rule == 3) split(v, 15, "N", false);
        if (rule) split(v, 15, rule == 2 ? cl100k_pattern : gpt2_pattern, rule == 2);
        if (rule == 1) some_ranges(v);
        t = open_tokenizer(v, "bytes.tok");
        int wrong = 0;
        for (int i = 0; i < 256; i++) wrong += !round_trips(&t, &(char){(char)i}, 1);
        for (int i = 0; i < 2000; i++) {
            char s[100];
            int n = below(100);
            for (int j = 0; j < n; j++) s[j] = i % 2 ? (char)rnd() : "abc \xc3\xa9\n1'"[below(9)];
            wrong += !round_trips(&t, s, (size_t)n);
        }
        CHECK(!wrong, "any bytes survive encoding and decoding, rule %d: %d texts do not", rule,
              wrong);
        free_tokenizer(&t);
    }
}

typedef struct { const char *text, *ids, *says, *typed; bool no_bos; } Encoding;
static void test_encodings(const Tokenizer *t, const Encoding *cases) {
    for (; cases->text; cases++) {
        const char *got = shown(t, cases->text, cases->typed, !cases->no_bos);
        CHECK(!strcmp(got, cases->ids), "%s: %s, not %s", cases->says, got, cases->ids);
    }
}

static void test_special_tokens(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    split(v, 15, gpt2_pattern, false);
    all_bytes(v);
    v->flags = ADD_BOS;
    some_ranges(v);
    v->bos = word(v, "<s>", CONTROL);  // 256
    v->eos = word(v, "<|end|>", CONTROL);
    word(v, "<|end|>>", CONTROL), word(v, "\n\n", USER_DEFINED), word(v, "\n\n\n", USER_DEFINED);
    int previous = 'x';  // x, xx, xxxx, ...
    for (size_t n = 2; n <= 32; n *= 2) {
        int id = word(v, text("%.*s", (int)n, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"), NORMAL);
        merge(v, previous, previous);
        previous = id;
    }
    put32(&v->stops, 258), v->n_stops = 1;
    Tokenizer t = open_tokenizer(v, "special.tok");
    test_encodings(&t, (Encoding[]){
        {"a<|end|>b", "97 257 98", "special tokens are recognised in a text", NULL, true},
        {"<|end|>>", "258", "the longest special token wins", NULL, true},
        {"<|end|>", "60 124 101 110 100 124 62", "typed text does not form special tokens",
         "\1\1\1\1\1\1\1", true},
        {"<|end|>", "60 124 101 110 100 124 62", "nor does half of one", "\0\0\0\0\1\1\1", true},
        {"<|end|>>", "257 62", "a typed byte behind one does not count", "\0\0\0\0\0\0\0\1", true},
        {"\n\n\n\n\n", "260 259", "user-defined tokens are matched in any text, longest first",
         "\1\1\1\1\1", true},
        {"<|en", "60 124 101 110", "an unfinished special token is text", NULL, true},
        {"a", "256 97", "BOS comes first", NULL, false},
        {"<s>a", "256 97", "BOS is not doubled", NULL, false},
        {"a<s>", "256 97 256", "BOS elsewhere does not count as first", NULL, false},
        {"", "256", "an empty text is BOS", NULL, false},
        {"", "", "and nothing without it", NULL, true},
        {"xxxxx x", "262 120 32 120", "merges go from the best on", NULL, true}, {0}});
    CHECK(is_stop(&t, 258) && is_stop(&t, v->eos) && !is_stop(&t, 256) && !is_stop(&t, 5),
          "stops are EOS and the listed");
    CHECK(decode(&t, -1, 257).len == 0 && decode(&t, -1, -1).len == 0 &&
              decode(&t, -1, v->n).len == 0 && decode(&t, -1, 'x').len == 1,
          "special tokens and ids that are none have no text");
    size_t n = 1 << 20;
    Ids ids = ids_of(&t, memset(get(n, 1), 'x', n), n, NULL, false);
    CHECK(ids.n == n / 32, "a word of a million equal bytes becomes %zu tokens, not %zu", n / 32,
          ids.n);
    free_tokenizer(&t);
}

static void test_sentencepiece(void) {
    Vocabulary *v = new_vocabulary(SENTENCEPIECE);
    v->flags |= ADD_BOS | DROP_SPACE;
    step(v, REPLACE, 0, "", " ");
    v->unk = word(v, "<unk>", CONTROL), v->bos = word(v, "<s>", CONTROL);
    v->eos = word(v, "</s>", CONTROL);
    all_bytes(v);  // 3 to 258
    // from 259 on
    const char *normal[] = {" ", "a", "b", "c", "ab", "bc", " a", "abc", "\xc3\xa9"};
    double scores[] = {-100, -100, -100, -100, -3, -3, -4, -9, -100};
    for (int i = 0; i < 9; i++) token(v, normal[i], strlen(normal[i]), scores[i], NORMAL);
    word(v, "aa", USER_DEFINED), word(v, "cb", UNUSED);  // 268, 269
    Tokenizer t = open_tokenizer(v, "sentence.tok");
    test_encodings(&t, (Encoding[]){
        {"bc", "1 259 264", "a space goes in front, BOS before it", 0, 0},
        {"abc", "1 259 266", "ab joins before bc, of equals the leftmost, and before space and a",
         0, 0},
        {"a", "1 265", "the space joins what follows", 0, 0},
        {"", "1", "an empty text has no space", 0, 0},
        {"\xc3\xa9", "1 259 267", "a character of two bytes is one symbol", 0, 0},
        {"z\xe2\x82\xac", "1 259 125 229 133 175", "what the vocabulary lacks becomes bytes", 0, 0},
        {"\xff", "1 259 258", "so does what is not UTF-8", 0, 0},
        {"aaa", "1 268 265", "user-defined tokens are matched as a whole", 0, 0},
        {"cb", "1 259 262 261", "unused tokens are not", 0, 0},
        {"</s>b", "1 2 259 261", "special tokens are recognised", 0, 0}, {0}});
    CHECK(decode(&t, 1, 265).len == 1 && decode(&t, 5, 265).len == 2 && decode(&t, 1, 259).len == 0,
          "decoding drops the space behind BOS");
    CHECK(decode(&t, -1, 125).len == 1 && decode(&t, -1, 125).s[0] == 'z',
          "a byte token is its byte");
    free_tokenizer(&t);

    v = new_vocabulary(SENTENCEPIECE);
    for (int i = 0; i < 5; i++) token(v, &" abcd"[i], 1, -1000, NORMAL);
    random_merges(v, " abcd", 90);
    t = open_tokenizer(v, "random.tok");
    test_naive(v, &t, " abcd");
    free_tokenizer(&t);
}

// What the tokenizers library of Hugging Face gives for the same (checked with its version 0.23).
static void test_added_tokens(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    all_bytes(v);
    some_ranges(v);
    static const struct { const char *s; int flags; } tokens[] = {  // from 256 on
        {"<l>", LSTRIP}, {"<r>", RSTRIP}, {"<w>", SINGLE_WORD}, {"<b>", LSTRIP | RSTRIP},
        {"\n", 0}, {"<n>", NORMALIZED}, {"<nn>", NORMALIZED | LSTRIP}, {"_p", NORMALIZED}};
    for (int i = 0; i < 8; i++) {
        token(v, tokens[i].s, strlen(tokens[i].s), 0, NORMAL);
        added(v, 256 + i, tokens[i].s, strlen(tokens[i].s), tokens[i].flags);
    }
    added(v, '!', "!", 1, ONLY_UNTYPED);
    token(v, "?", 1, 0, CONTROL);
    step(v, REPLACE, 0, "", "_"), step(v, FIND, 1, "", "");
    Tokenizer t = open_tokenizer(v, "added.tok");
    test_encodings(&t, (Encoding[]){
        {"a \t<l> b", "97 256 95 32 98", "LSTRIP takes the white space before", NULL, true},
        {"a \x80<l>b", "97 32 128 256 95 98", "but no byte that is no character", NULL, true},
        {"a <r> \xe3\x80\x80" "b", "97 32 257 95 98", "RSTRIP the one behind", NULL, true},
        {"<r>\n", "257 260", "and yet that may be a token, too", NULL, true},
        {"<b>  <b> ", "259 259", "what one has taken is not there for the next", NULL, true},
        {"a<w> 1<w> <w>b", "97 60 119 62 32 49 60 119 62 32 60 119 62 98",
         "SINGLE_WORD: not in a word", NULL, true},
        {"-<w>- <w>", "45 258 95 45 32 258", "but beside other characters", NULL, true},
        {"a<n> <nn>", "97 261 262", "NORMALIZED ones are found later", NULL, true},
        {"<w>p<w>!p", "60 119 62 112 60 119 62 33 263",
         "in the text that is changed: the piece behind ! begins with _", NULL, true},
        {"?!", "264 33", "single characters can be control tokens", "\0", true},
        {"?!", "63 33", "but typed they are text", "\1\1", true}, {0}});
    free_tokenizer(&t);
}

static void test_steps(void) {
    static const struct { int how; const char *ids[3], *says; } cases[] = {
        {0, {"32 97", "32 32 97", "97 256 32 98"}, "a space in front of everything"},
        {1, {"32 97", "32 97", "97 256 32 98"}, "unless there is one"},
        {3, {"32 97", "32 97", "97 256 98"}, "only of a text's first stretch"}};
    for (int i = 0; i < 3; i++) {
        Vocabulary *v = new_vocabulary(CHARACTERS);
        all_bytes(v);
        word(v, "<s>", CONTROL);
        step(v, REPLACE, 0, "_", " "), step(v, REPLACE, cases[i].how, "", " ");
        Tokenizer t = open_tokenizer(v, "steps.tok");
        test_encodings(&t, (Encoding[]){
            {"a", cases[i].ids[0], cases[i].says, NULL, false},
            {"_a", cases[i].ids[1], cases[i].says, NULL, false},
            {"a<s>b", cases[i].ids[2], cases[i].says, NULL, true},
            {"_<s>", "32 256", "a step's text is changed by the next", NULL, true}, {0}});
        free_tokenizer(&t);
    }
    static const struct { int how; const char *pattern, *cut; } splits[] = {
        {15, "N", "a|1|2|-|3|b"}, {47, "N", "a|-|b"}, {31, "N", "1|2|3"}, {13, "N", "a1|2|-3|b"},
        {11, "N", "a|1|2-|3b"}, {6, "N", "a|12|-|3|b"}, {15, "NO|L", "a|1|2-|3|b"},
        {15, "LN?N", "a12|-3b"}, {15, "LN3N", "a12|-3b"}, {15, "LN&N", "a12-3b"},
        {15, "L=N|O", "a|12|-|3b"}, {15, "L!N|O!L|N+", "a|12|-|3|b"}, {15, "L*N*", "a12|-|3|b"}};
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
        Vocabulary *v = new_vocabulary(IGNORE_MERGES);
        for (int c = 0; c < 256; c++) token(v, &(char){(char)c}, 1, 0, NORMAL);
        some_ranges(v);
        split(v, splits[i].how, splits[i].pattern, false);
        for (const char *p = splits[i].cut, *end; *p; p = end + (*end == '|')) {
            end = p + strcspn(p, "|");
            if (end - p > 1) token(v, p, (size_t)(end - p), 0, NORMAL);
        }
        Tokenizer t = open_tokenizer(v, "splits.tok");
        Buffer cut = {0};
        Ids ids = ids_of(&t, "a12-3b", 6, NULL, true);
        for (size_t j = 0; j < ids.n; j++) {
            if (j) put_text(&cut, "|");
            put(&cut, t.tokens[ids.ids[j]].text.s, t.tokens[ids.ids[j]].text.len);
        }
        CHECK(is_text(&cut, splits[i].cut), "%s, how %d, cuts a12-3b into %s, not %s",
              splits[i].pattern, splits[i].how, splits[i].cut, cut.p);
        free_tokenizer(&t);
    }
}

// Bytes and characters without a token are left out, and what is beside them is joined; or they are
// unknown, one each or together, or the bytes they are made of.
static void test_unknown(void) {
    for (int which = 0; which < 4; which++) {
        Vocabulary *v = new_vocabulary(which ? CHARACTERS : BYTE_LEVEL);
        word(v, "a", NORMAL), word(v, "b", NORMAL), word(v, "ab", NORMAL);
        merge(v, 0, 1);
        word(v, "<unk>", CONTROL), word(v, "ba", CONTROL);
        merge(v, 1, 0);
        if (which == 3) token(v, "\xc3", 1, 0, BYTE), token(v, "\xa9", 1, 0, BYTE);
        if (which == 2) v->flags |= FUSE_UNK;
        if (which) v->unk = 3;
        Tokenizer t = open_tokenizer(v, "unknown.tok");
        const char *ids[] = {"2", "0 3 3 1", "0 3 1", "0 5 6 3 1"};
        test_encodings(&t, (Encoding[]){
            {"a\xc3\xa9\x04" "b", ids[which], "what is no token", NULL, true},
            {"ba", "4", "a control token", "\0\0", true},
            {"ba", "1 0", "is never made of what is typed", "\1\1", true},
            {"<unk>", "3", "<unk> in a text is a token", NULL, true}, {0}});
        free_tokenizer(&t);
    }
}

// Normal form C, with some of Unicode's tables.
static void test_normal_form(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    static const uint32_t forms[][3] = {
        {0xe9, 'e', 0x301}, {0xe1, 'a', 0x301}, {0x1ea1, 'a', 0x323}, {0xc5, 'A', 0x30a},
        {0x212b, 'A', 0x8000030a}, {0x340, 0x300, 0x80000000}, {0x1eb7, 0x1ea1, 0x306}};
    static const uint32_t marks[][3] = {{0x300, 0x314, 230}, {0x323, 0x323, 220},
                                        {0x334, 0x334, 1}};
    all_bytes(v);
    word(v, "<s>", CONTROL), word(v, "\xc3\xa9", CONTROL), added(v, 257, "\xc3\xa9", 2, 24);
    put(&v->forms, forms, sizeof forms), v->n_forms = 7;
    put(&v->marks, marks, sizeof marks), v->n_marks = 3;
    step(v, NORMAL_FORM_C, 0, "", ""), step(v, FIND, 1, "", "");
    Tokenizer t = open_tokenizer(v, "form.tok");
    static const struct { const char *from, *to; } cases[] = {
        {"a\u0301", "\u00e1"}, {"a\u0334\u0301", "\u00e1\u0334"}, {"a\u0301\u0301", "\u00e1\u0301"},
        {"a\u0301\u0323", "\u1ea1\u0301"}, {"a\u0306\u0323", "\u1eb7"}, {"\u1eb7", "\u1eb7"},
        {"\u212b", "\u00c5"}, {"A\u030a", "\u00c5"}, {"\u0340", "\u0300"}, {"\u0301a", "\u0301a"},
        {"\u1112\u1161\u11ab", "\ud55c"}, {"\ud558\u11ab", "\ud55c"},
        {"\ud55c\u11ab", "\ud55c\u11ab"},
        {"\u1112\u1161\u11a7", "\ud558\u11a7"}, {"a\xff\u0301\xcc", "a\xff\u0301\xcc"},
        {"\U0001f600\u0301", "\U0001f600\u0301"}, {"\u1ea1\xcc", "\u1ea1\xcc"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Ids ids = ids_of(&t, cases[i].from, strlen(cases[i].from), NULL, true);
        Buffer b = decoded(&t, ids.ids, ids.n);
        CHECK(is_text(&b, cases[i].to), "%s becomes %s, not %s", cases[i].from, cases[i].to, b.p);
    }
    test_encodings(&t, (Encoding[]){
        {"e\u0301", "257", "a control token can come of it", "\0\0\0", true},
        {"e\u0301", "195 169", "but not where a part is typed", "\0\1\1", true}, {0}});
    free_tokenizer(&t);
}

// What takes time in proportion to the text's square would not end.
static void test_long_texts(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    split(v, 15, cl100k_pattern, true);
    all_bytes(v);
    some_ranges(v);
    Tokenizer t = open_tokenizer(v, "long.tok");
    size_t n = 1 << 20;
    char *s = get(n, 1);
    for (int i = 0; i < 5; i++) {
        memset(s, "  \nx1"[i], n);
        if (i == 1) s[n - 1] = 'x';
        Ids ids = ids_of(&t, s, n, NULL, false);
        CHECK(ids.n == n, "a million times %d are as many tokens: %zu", s[0], ids.n);
    }
    free_tokenizer(&t);
}

// llama2.c's layout: score, length and text of each of 3 special tokens, 256 bytes, 7 words.
static Buffer llama2c_tokenizer(void) {
    const char *pieces[266] = {"<unk>", "\n<s>\n", "\n</s>\n", [259] = " ", "a", "b", "c", " a",
                               "ab", "abc"};
    Buffer b = {0};
    put32(&b, 20);
    for (int i = 0; i < 266; i++) {
        const char *s = i < 3 || i >= 259 ? pieces[i] : text("<0x%02X>", i - 3);
        put(&b, &(float){i < 259 ? 0 : (float)-i}, 4);
        put32(&b, (int)strlen(s)), put_text(&b, s);
    }
    return b;
}
static const char *open_llama2c(Tokenizer *t, const Buffer *b, size_t cut, int vocab,
                                uint64_t hash) {
    Header h = {.tokenizer_hash = hash};
    Model m = {.c.vocab_size = vocab, .header = &h};
    return load_tokenizer(t, save("llama2c.tok", b->p, b->n - cut), &m);
}

static void test_llama2c_tokenizer(void) {
    Buffer b = llama2c_tokenizer();
    Tokenizer t;
    const char *wrong = open_llama2c(&t, &b, 0, 266, 0);
    if (!CHECK(!wrong, "llama2.c's layout opens: it %s", wrong)) return;
    const char *got = shown(&t, "abc a\n", NULL, true);
    CHECK(!strcmp(got, "1 263 261 262 263 13"), "llama2.c's layout encodes: %s", got);
    const char *plain = shown(&t, "<unk>\n<s>\n", NULL, false);
    CHECK(!strcmp(plain, "63 120 113 110 65 13 63 118 65 13"),
          "its special tokens are found in no text: %s", plain);
    CHECK(is_stop(&t, 1) && !is_stop(&t, 2), "only BOS ends one of llama2.c's stories");
    CHECK(decode(&t, -1, 13).s[0] == '\n' && decode(&t, 1, 263).len == 1, "and decodes");
    free_tokenizer(&t);
    struct { int vocab; size_t cut; uint64_t hash; } bad[] = {
        {265, 0, 0}, {267, 0, 0}, {266, 1, 0}, {266, 100, 0}, {266, b.n - 3, 0}, {266, b.n - 8, 0},
        {266, 0, 5}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(open_llama2c(&t, &b, bad[i].cut, bad[i].vocab, bad[i].hash),
              "a tokenizer of 266 tokens less %zu bytes is refused for a model of %d", bad[i].cut,
              bad[i].vocab);
        free_tokenizer(&t);
    }
}

static void test_real_tokenizer(void) {
    static const char rendered1[] =
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n";
    static const char rendered2[] =
        "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nArr!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n";
    static const char chat1[] =
        "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 "
        "198 1 4093 198 26843 665 2 198 1 520 9531 198";
    static const char chat2[] =
        "1 9690 198 2683 359 253 30820 30 2 198 1 4093 198 19556 2 198 1 520 9531 198 40909 17 2 "
        "198 1 4093 198 3087 85 2 198 1 520 9531 198";
    static const Encoding cases[] = {
        {"Once upon a time", "6403 1980 253 655", "SmolLM2's tokens", 0, 0},
        {"Hello, world! It's 2026; we've 1234567 things.",
         "19556 28 905 17 657 506 216 34 32 34 38 43 392 3543 216 33 34 35 36 37 38 39 1495 30",
         "SmolLM2's digits", 0, 0},
        {"  leading and   multiple   spaces \n\n\ttabs",
         "216 2899 284 256 2701 256 5600 38028 197 100 7366", "SmolLM2's spaces", 0, 0},
        {"\xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82, \xd0\xbc\xd0\xb8\xd1\x80! \xd0\x81\xd0"
         "\xb6. \xce\x91\xce\x92\xce\x93 \xce\xb4\xce\xad\xce\xbb\xcf\x84\xce\xb1",
         "155 249 46879 16464 32547 28 41337 7872 9175 17 5470 219 40186 30 5664 235 153 236 153 "
         "237 31035 34075 17162 14514 8998", "SmolLM2's Russian and Greek", 0, 0},
        {"def f(x):\n    return x**2  # comment\n",
         "1604 275 24 104 727 472 1003 1792 828 34 216 907 5189 198", "SmolLM2's code", 0, 0},
        {"\r\nwindows\r\nlines\r\n", "201 198 37066 201 198 5110 2738", "SmolLM2's lines", 0, 0},
        {"<|im_start|>user\nhi<|im_end|>\n", "1 4093 198 6004 2 198", "SmolLM2's turns", 0, 0},
        {"....!!!?""?""?---", "5592 29646 16693 47 5583", "SmolLM2's points", 0, 0},
        {" ", "216", "SmolLM2's space", 0, 0}, {"\n", "198", "SmolLM2's newline", 0, 0},
        {"1234*4321=5332114", "33 34 35 36 26 36 35 34 33 45 37 35 35 34 33 33 36",
         "SmolLM2's sums", 0, 0},
        {rendered1, chat1, "SmolLM2's tokens of a rendered chat", 0, 0},
        {rendered2, chat2, "SmolLM2's tokens of a rendered chat with a system turn", 0, 0}, {0}};
    Tokenizer t;
    Model m = {.c = {.vocab_size = 49152}};
    const char *path = at_home("tokenizer.bin");
    if (access(path, R_OK)) {
        skip(16, "SmolLM2's tokenizer, as there is no tokenizer.bin: git checkout tokenizer.bin");
        return;
    }
    const char *wrong = load_tokenizer(&t, path, &m);
    if (!CHECK(!wrong, "tokenizer.bin opens: it %s", wrong)) return;
    test_encodings(&t, cases);
    Prompt p = {0}, q = {0}, r = {0};
    prompt_turn(&p, &t, -1, (Text){NULL, 0}, (Text){"Hi there", 8}, USER_AFTER);
    CHECK(!strcmp(shown(&t, p.s, p.typed, true), chat1),
          "a first turn is written as the chat template writes it: %s", p.s);
    prompt_turn(&q, &t, -1, (Text){"You are a pirate.", 17}, (Text){"Hello", 5}, REPLY_BEFORE);
    prompt_append(&q, (Text){"Arr!", 4}, true);
    prompt_turn(&q, &t, 1, (Text){"You are a pirate.", 17}, (Text){"Bye", 3}, USER_AFTER);
    CHECK(!strcmp(shown(&t, q.s, q.typed, true), chat2), "so are two turns: %s", q.s);
    prompt_turn(&r, &t, -1, (Text){NULL, 0}, (Text){"<|im_end|>", 10}, USER_AFTER);
    Ids ids = ids_of(&t, r.s, r.n, r.typed, true);
    int ends = 0;
    for (size_t i = 0; i < ids.n; i++) ends += ids.ids[i] == 2;
    CHECK(ends == 2, "a user who types <|im_end|> does not end the turn");
    prompt_free(&p), prompt_free(&q), prompt_free(&r), free_tokenizer(&t);
}

static void test_tokenizer(void) {
    test_words();
    test_byte_level();
    test_special_tokens();
    test_sentencepiece();
    test_added_tokens();
    test_steps();
    test_unknown();
    test_normal_form();
    test_long_texts();
    test_llama2c_tokenizer();
    test_real_tokenizer();
}

// ==== Running ./run ==============================================================================

// What a command printed; status: 128 + n after signal n.
typedef struct { int status; Buffer out, err; const char *command; } Ran;

static const char *program(void) {
    const char *path = getenv("RUN");
    return path && path[0] == '/' ? path : at_home(path ? path : "run");
}
// What commands can use: the program; a chat of short greedy replies; a text in which a tool
// speaks; the seed of the best of several samples; what b has behind a's length.
static const char prelude[] =
    "run() { \"$RUN\" \"$@\"; }; chat() { run endless.bin -m chat -n 12 -t 0 -q -c 999 "
    "--repeat-penalty 1 \"$@\"; }; "
    "tooled() { run endless.bin -T \"yes 'a b c' | head -c 3000\" -i 1+1 -n 4 -c 4000 -t 9 -p 1 -q "
    "--receipt \"$@\"; }; best() { run \"$@\" 2>&1 >/dev/null | sed -n 's/.*seed \\([0-9]*\\),.*, "
    "the best$/\\1/p'; }; rest() { tail -c +$(($(wc -c <$1) + 1)) $2; }; E=endless.bin; "
    "e() { run endless.bin \"$@\"; }; t() { run tiny.bin \"$@\"; }; settling() { "
    "SOURCE_DATE_EPOCH=0 run settling.bin -m chat -q -n 9 -t 0 -c 99 \"$@\"; }; ";

// Splits a command that needs no shell, of words and '...', in place. Returns their number, or 0.
static int words_of(char *s, const char **argv) {
    int n = 0;
    if (strncmp(s, "run ", 4) || strpbrk(s, "|&;<>()$`\\\"*?[]\n")) return 0;
    for (char *to = s; *s; *to++ = 0) {
        for (argv[n++] = to; *s && *s != ' '; s++) {
            if (*s != '\'') *to++ = *s;
            else for (s++; *s != '\''; s++) *to++ = *s;
        }
        while (*s == ' ') s++;
    }
    argv[0] = program();
    return n;
}

// Starts a program whose standard files are these; alarm_after: it ends then at the latest. (vfork
// copies no page tables: with the tests' memory that takes most of the time.)
static pid_t start(const char *const *argv, const int fds[3], unsigned alarm_after) {
    volatile unsigned most = patience(alarm_after);
    fflush(stdout);
    pid_t pid = vfork();
    if (pid) return pid > 0 ? pid : (abort(), 0);
    setpgid(0, 0);
    for (int i = 0; i < 3; i++) if (dup2(fds[i], i) < 0) _exit(99);
    for (int i = 3; i < 20; i++) close(i);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    for (int i = 0; i < 3; i++) signal((int[]){SIGPIPE, SIGHUP, SIGINT}[i], SIG_DFL);
    alarm(most);
    execv(argv[0], (char *const *)(uintptr_t)argv);
    _exit(98);
}
static int status_of(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Runs a command, of sh where it needs one.
static Ran ran(const char *command) {
    Ran r = {.command = command};
    const char *argv[60] = {0}, *shell[] = {"/bin/sh", "-c", text("%s%s", prelude, command), NULL};
    char *words = strcpy(get(strlen(command) + 2, 1), command);
    bool direct = words_of(words, argv);
    setenv("RUN", program(), 1);
    int fds[] = {open("/dev/null", O_RDONLY), open("stdout", O_RDWR | O_CREAT | O_TRUNC, 0600),
                 open("stderr", O_RDWR | O_CREAT | O_TRUNC, 0600)};
    pid_t pid = start(direct ? argv : shell, fds, 60);
    for (int i = 0; i < 3; i++) close(fds[i]);
    r.status = status_of(pid);
    kill(-pid, SIGKILL);  // what it left running
    r.out = slurp("stdout"), r.err = slurp("stderr");
    return r;
}
#define SH(...) ran(text(__VA_ARGS__))
// What ends with an error frees nothing; a sanitizer need not say so.
static Ran ran_wrong(const char *command) {
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1);
    Ran r = ran(command);
    unsetenv("ASAN_OPTIONS");
    return r;
}

// Waits until the program catches SIGINT: before that a signal ends it like any other program.
static bool catches_signals(pid_t pid) {
    char line[200];
    const char *path = text("/proc/%d/status", (int)pid);
    for (int i = 0; i < 2000; i++, usleep(500)) {
        FILE *f = fopen(path, "r");
        unsigned long long caught = 0;
        while (f && fgets(line, sizeof line, f)) sscanf(line, "SigCgt: %llx", &caught);
        if (f) fclose(f);
        if (caught >> (SIGINT - 1) & 1) return true;
        if (!f) return false;
    }
    return false;
}
// Starts a command, whose stdin is `in`, and sends it signals after a while. Returns its status.
static int signalled(const char *command, int in, int number, int after, bool again) {
    const char *argv[60] = {0};
    int null = open("/dev/null", O_RDWR), out = open("stdout", O_RDWR | O_CREAT | O_TRUNC, 0600);
    words_of(text("%s", command), argv);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1);  // an exit in the middle frees nothing
    pid_t pid = start(argv, (int[]){in < 0 ? null : in, out, null}, 20);
    bool caught = catches_signals(pid);
    close(null), close(out);
    usleep((useconds_t)below(after));
    if (caught) kill(pid, number);
    if (caught && again) usleep((useconds_t)below(2000)), kill(pid, number);
    int status = status_of(pid);
    unsetenv("ASAN_OPTIONS");
    return status;
}

static int lines(const Buffer *b) {
    int n = 0;
    for (size_t i = 0; i < b->n; i++) n += b->p[i] == '\n';
    return n;
}
static bool one_line(const Ran *r) {
    return !strncmp((char *)r->err.p, "run: ", 5) && lines(&r->err) == 1 &&
           r->err.p[r->err.n - 1] == '\n' && r->err.n > 12;
}
// Whether a command needs a room of the program that was cut out: whose macro is not its own name.
#define TEXT_OF(macro) #macro
#define CUT(macro) (*TEXT_OF(macro) == '1')
static bool cut_out(const char *command) {
    const struct { bool cut; const char *word; } words[] = {
        {CUT(NO_SESSIONS), " -S"}, {CUT(NO_SESSIONS), "/save"}, {CUT(NO_SESSIONS), "/load"},
        {CUT(NO_CHAT), "chat"}, {CUT(NO_CHAT), " -y"}, {CUT(NO_CHAT), "settling"},
        {CUT(NO_EACH), "--each"}, {CUT(NO_TOOLS), " -T"}, {CUT(NO_TOOLS), "tooled"},
        {CUT(NO_ENSEMBLE), " -e "}, {CUT(NO_COMPRESS), "compress"},
        {CUT(NO_SCHEMA), "--schema"}, {CUT(NO_SCHEMA), "--json"},
        {CUT(NO_EXPLAIN), "explain"}, {CUT(NO_EXPLAIN), "--trace"}, {CUT(NO_EXPLAIN), "--layer"}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (words[i].cut && strstr(command, words[i].word)) return true;
    return false;
}

// The program ended with this status, said why in one line that has this text, and wrote nothing to
// stdout.
static bool is_refused(const Ran *r, int status, const char *says) {
    return r->status == status && !r->out.n && one_line(r) && strstr((char *)r->err.p, says);
}
static void refused(int status, const char *says, const char *command) {
    if (cut_out(command)) return;
    Ran r = ran_wrong(command);
    CHECK(is_refused(&r, status, says),
          "%s is refused with %d and a line with \"%s\": it gives %d, %zu bytes, \"%.300s\"",
          command, status, says, r.status, r.out.n, r.err.p);
}
// It did what it was asked to, or said in one line why not; never a crash.
static void survived(const char *command) {
    if (cut_out(command)) return;
    Ran r = ran_wrong(command);
    CHECK(r.status == 0 || (r.status == 1 && one_line(&r)),
          "%s never ends in a crash: it gives %d, \"%.300s\"", command, r.status, r.err.p);
}
static void prints_bytes(const char *what, const Buffer *expected, const char *command) {
    if (cut_out(command)) return;
    Ran r = ran(command);
    CHECK(r.status == 0 && equal(&r.out, expected),
          "%s: %s gives %d, \"%.200s\", not \"%.200s\", \"%.300s\"", what, command, r.status,
          r.out.p, expected->p, r.err.p);
}
static void prints(const char *what, const char *expected, const char *command) {
    Buffer b = bytes_of(expected, strlen(expected));
    prints_bytes(what, &b, command);
}
// Two commands print the same bytes.
static void same(const char *what, const char *one, const char *other) {
    if (cut_out(one) || cut_out(other)) return;
    Ran a = ran(one), b = ran(other);
    CHECK(a.status == 0 && b.status == 0 && equal(&a.out, &b.out) && a.out.n,
          "%s:\n  %s\n  %s\n  print the same: status %d and %d, %zu and %zu bytes, %.200s%.200s",
          what, one, other, a.status, b.status, a.out.n, b.out.n, a.err.p, b.err.p);
}

// ---- Models with their tokenizers that most tests below use

static const char *const tiny_chat[] = {"", "<s>system ", "<|end|>", "<s>", "<s>", "<s>", "<|end|>",
                                        "<|end|>", "\n"};
static Vocabulary *tiny_vocabulary(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    split(v, 15, cl100k_pattern, true);
    all_bytes(v);
    some_ranges(v);
    random_merges(v, "abc d", 20);
    v->bos = word(v, "<s>", CONTROL);
    word(v, "<|end|>", CONTROL);
    put32(&v->stops, 277), v->n_stops = 1;
    chat_format(v, tiny_chat, (int[N_CHAT]){[SYSTEM_BEFORE] = HAS_SYSTEM, [USER_AFTER] = THOUGHTS});
    return v;
}

// Adds a text, and a chat's turn between <s> and <|end|>, with their tokens to what -m check
// recomputes.
static void certify_tokenizer(Made *m, const Vocabulary *v) {
    Tokenizer t = open_tokenizer(v, "certify.tok");
    const char *plain = "a bad cab: 12 <s>caf\xc3\xa9!", *user = "abc<s>";
    Ids ids[2] = {ids_of(&t, plain, strlen(plain), NULL, true),
                  ids_of(&t, "<s>abc<s><|end|>", 16, "\0\0\0\1\1\1\1\1\1\0\0\0\0\0\0", true)};
    Buffer b = {0};
    put32(&b, 2);
    for (int i = 0; i < 2; i++) {
        const char *s = i ? user : plain;
        put32(&b, i), put32(&b, (int)strlen(s)), put32(&b, (int)ids[i].n);
        put_text(&b, s);
        align(&b, 4);
        put(&b, ids[i].ids, ids[i].n * 4);
    }
    m->check_cases = bytes_tensor(&b);
    m->tokenizer_hash = t.h.hash;
    free_tokenizer(&t);
}

static Made tiny_model(int which, int dtype) {
    Shape s = family(which, dtype);
    s.vocab = 278, s.layers = 1 + (which == GEMMA);
    return make_weights(&s);
}
static void save_model(const char *name, const Made *m, const Vocabulary *v) {
    Buffer b = m->s.dtype == ROWS ? llama2c_file(m, 0) : version_5(m),
           t = m->s.dtype == ROWS ? llama2c_tokenizer() : tokenizer_file(v);
    keep(text("%s.bin", name), &b), keep(text("%s.tok", name), &t);
}
// tiny: with a certificate. endless: with room for long texts that never end, as its tokenizer has
// no EOS and no stops; other: like it, but smaller. plain: without a chat format. nowhere: a system
// turn has no place in it. filling, turned: with a form for --suffix. settling: answered turns are
// written in another way. llama: a file of llama2.c's. wordless: no token for what a chat says.
static void make_models(void) {
    static bool made;
    uint64_t keep_state = random_state;
    if (made) return;
    made = true, random_state = 99;
    Vocabulary *v = tiny_vocabulary();
    Made m = tiny_model(LLAMA, Q8);
    certify(&m), certify_tokenizer(&m, v);
    save_model("tiny", &m, v);
    Shape s = family(LLAMA, Q8), small = family(LLAMA, Q4), rows = family(LLAMA, ROWS);
    s.vocab = small.vocab = 278, rows.vocab = 266, s.layers = small.layers = rows.layers = 1;
    s.seq_len = 1 << 20, small.seq_len = 60, rows.seq_len = 200;
    v->n_stops = 0, v->stops.n = 0;
    m = make_weights(&s);
    save_model("endless", &m, v);
    v->chat.n = 0, v->n_chat = 0;
    chat_format(v, tiny_chat, (int[N_CHAT]){0});
    save_model("nowhere", &m, v);
    v->chat.n = 0, v->n_chat = 0;
    chat_format(v, (const char *[]){"%d %B ", "<s>", ":", "<s>u", "u", "<s>w", "<|end|>t",
                                    "<|end|>", "."},
                (int[]){DATE, HAS_SYSTEM | SYSTEM_LAST, 0, 3, 3, 3, THOUGHTS, 3, 0});
    save_model("settling", &m, v);
    v->chat.n = 0, v->n_chat = 0;
    for (int i = 0; i < N_CHAT; i++) chat_piece(v, "", 0);
    save_model("plain", &m, v);
    for (int turned = 0; turned < 2; turned++) {
        v->chat.n = 0, v->n_chat = 0;
        for (int i = 0; i < N_CHAT; i++) chat_piece(v, "", 0);
        chat_piece(v, turned ? "<s>\1<|end|>{}" : "<s>{}<|end|>\1", 0);
        save_model(turned ? "turned" : "filling", &m, v);
    }
    v = tiny_vocabulary(), v->n_stops = 0, v->stops.n = 0;
    m = make_weights(&small);
    save_model("other", &m, v);
    m = make_weights(&rows);
    save_model("llama", &m, v);
    v = new_vocabulary(BYTE_LEVEL);
    for (int i = 0; i < 278; i++) word(v, "a", NORMAL);
    for (int i = 0; i < N_CHAT; i++) chat_piece(v, "Z", 0);
    m = make_weights(&s);
    save_model("wordless", &m, v);
    random_state = keep_state;
}
static bool no_program(void) {
    if (!access(program(), X_OK)) return make_models(), false;
    return !CHECK(false, "there is %s to test", program());
}

// ==== 7. Files, whole and damaged ================================================================

#define LOGITS_OF(path) "run " path " -m logits -i '1 2 3' -j 1"
#define TOKENIZE "run any.bin -z damaged.tok -m tokenize -i 'abc <s> 12 d'"
// A damaged file: what a command says of it must name it.
static const char *damaged_file = "damaged.bin";
#define damaged(b, may, ...) damaged_(b, may, text(__VA_ARGS__))
static void damaged_(const Buffer *b, bool may, const char *what) {
    keep(damaged_file, b);
    Ran r = ran_wrong(strstr(damaged_file, ".tok") ? TOKENIZE : LOGITS_OF("damaged.bin"));
    CHECK(is_refused(&r, 1, damaged_file) || (may && r.status == 0),
          "%s is %s: status %d, %zu bytes, \"%.300s\"", what, may ? "no crash" : "refused",
          r.status, r.out.n, r.err.p);
}

static void test_whole_files(void) {
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            Vocabulary *v = tiny_vocabulary();
            Made m = tiny_model(which, dtype);
            certify(&m), certify_tokenizer(&m, v);
            save_model("whole", &m, v);
            prints(name_of(&m), "ok\n", "run whole.bin -m check -j 2");
            if (dtype != F32) continue;
            Tensor *stored[] = {&m.check_norms, &m.check_logits, &m.check_cases};
            for (int i = 0; i < 3; i++) {  // another exponent, or another token
                stored[i]->bytes[stored[i]->n - 1] ^= 1;
                save_model("whole", &m, v);
                refused(1, "check failed", "run whole.bin -m check -q");
                stored[i]->bytes[stored[i]->n - 1] ^= 1;
            }
            m.check_ids = m.check_norms = m.check_logits = m.check_cases = (Tensor){0};
            save_model("whole", &m, v);
            prints("no reference values are no error", "ok\n", "run whole.bin -m check");
        }
    // The tensors of a file are found by their names.
    Buffer b = slurp("tiny.bin");
    uint32_t n = read_u32(b.p + 40);
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *one = b.p + 512 + 64 * i, swap[64];
        uint8_t *other = b.p + 512 + 64 * ((i + 1 + rnd() % (n - 1)) % n);
        memcpy(swap, one, 64), memcpy(one, other, 64), memcpy(other, swap, 64);
    }
    seal(&b), keep("mixed.bin", &b);
    same("tensors may come in any order", LOGITS_OF("mixed.bin"), LOGITS_OF("tiny.bin"));
}

// One byte after another changed: refused in the header and directory, found by -m check elsewhere.
static void test_flips(const Buffer *whole) {
    Buffer b = copy(whole);
    size_t directory = 512 + 64 * (size_t)read_u32(b.p + 40);
    for (size_t i = 0; i < directory; i += i < 200 ? 1 : 3) {
        if (i >= 16 && i < 24) continue;  // the content's hash is the business of -m check
        b.p[i] ^= (uint8_t)(1 << (i * 5 + i / 8) % 8);
        damaged(&b, false, "a model with byte %zu changed", i);
        b.p[i] = whole->p[i];
    }
    for (int i = 0; i < 60; i++) {
        size_t at = i < 8 ? 16 + (size_t)i : directory + (size_t)(rnd() % (b.n - directory));
        uint8_t mask = (uint8_t)(1 << below(8));
        b.p[at] ^= mask;
        damaged(&b, true, "a model with byte %zu changed", at);
        refused(1, "damaged.bin", "run damaged.bin -m check -q -z tiny.tok -j 1");
        b.p[at] ^= mask;
    }
}

static void test_cuts(const Buffer *whole, int version) {
    size_t cuts[600], n = 0, directory = 0;
    if (version == 5) directory = 512 + 64 * (size_t)read_u32(whole->p + 40);
    for (size_t i = 1; i < 600; i += i < 64 ? 3 : 27) cuts[n++] = i;
    for (size_t i = 512; i < directory; i += 64) {
        size_t offset = get64(whole->p + i + 48), bytes = get64(whole->p + i + 56);
        for (size_t d = 0; d < 3; d++)
            cuts[n++] = offset + d - 1, cuts[n++] = offset + bytes + d - 1;
    }
    for (size_t i = 1; i < 8; i++) cuts[n++] = whole->n / 8 * i + i;
    size_t odd[] = {7, 27, 28, 255, 256, 257, 511, 513, whole->n - 1, whole->n - 4, whole->n - 64};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) cuts[n++] = odd[i];
    for (size_t i = 0; i < n; i++) {
        Buffer b = bytes_of(whole->p, cuts[i] < whole->n ? cuts[i] : whole->n - 1);
        damaged(&b, false, "a version %d model cut to %zu bytes", version, b.n);
    }
    for (size_t pad = 1; pad <= 64; pad *= 4) {
        Buffer b = copy(whole);
        put(&b, NULL, pad);
        damaged(&b, false, "a version %d model with %zu bytes too many", version, pad);
    }
}

// A file with a number of the header or directory changed, under hashes that are right.
static void changed(const Buffer *whole, size_t at, size_t size, uint64_t value, bool may,
                    const char *name) {
    Buffer b = copy(whole);
    memcpy(b.p + at, &value, size);
    seal(&b);
    damaged(&b, may, "a model with %s = %llx", name, (unsigned long long)value);
}
static void test_fields(const Buffer *whole) {
    static const int64_t values[] = {0, -1, INT_MAX, INT_MIN, 65536, 1 << 20, 1 << 24, 3};
    enum { NO, LENGTH_, ZERO, SWITCH, WINDOW, ANY };  // which values may be right
    static const struct { int offset, may; const char *name; } fields[] = {
        {112, NO, "dim"}, {116, NO, "hidden_dim"}, {120, NO, "n_layers"}, {124, NO, "n_heads"},
        {128, NO, "n_kv_heads"}, {132, NO, "vocab_size"}, {136, LENGTH_, "seq_len"},
        {140, NO, "head_dim"}, {144, ANY, "norm_eps"}, {148, SWITCH, "flags"},
        {152, SWITCH, "activation"}, {156, ANY, "embed_scale"}, {160, ANY, "attn_scale"},
        {164, WINDOW, "sliding_window"}, {200, ANY, "attn_cap"}, {204, ANY, "logit_cap"},
        {208, ANY, "query_growth"}, {212, WINDOW, "query_length"}, {216, ANY, "act_limit"},
        {220, ZERO, "n_experts"}, {224, ZERO, "n_shared"}, {228, ZERO, "n_active"},
        {232, ZERO, "expert_hidden"}, {24, NO, "file_size"}, {40, NO, "n_tensors"},
        {44, ZERO, "zero"}, {236, ZERO, "reserved"}, {508, ZERO, "reserved"}};
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
        for (int i = 0; i < 8; i++) {
            int64_t value = values[i];
            int may = fields[f].may;
            changed(whole, (size_t)fields[f].offset, 4, (uint64_t)value,
                    (may == LENGTH_ && value > 0 && value <= 1 << 24) || may == ANY ||
                        (may == ZERO && value == 0) || (may == SWITCH && value >= 0 && value < 4) ||
                        (may == WINDOW && value >= 0),
                    fields[f].name);
        }
    static const struct { size_t offset, size; uint64_t value; const char *name; } entries[] = {
        {0, 8, 0x6b726f77, "name"}, {32, 4, 6, "dtype"}, {32, 4, 7, "dtype"},
        {32, 4, 0xffffffff, "dtype"}, {36, 4, 0, "rows"}, {36, 4, 0x80000000, "rows"},
        {40, 4, 0, "cols"}, {40, 4, 0xffffffff, "cols"}, {40, 4, 0x10000, "cols"},
        {44, 4, 2, "layer"}, {44, 4, 0x80000000, "layer"}, {48, 8, 1, "offset"},
        {48, 8, (uint64_t)1 << 40, "offset"}, {48, 8, UINT64_MAX - 63, "offset"},
        {48, 8, (uint64_t)1 << 63, "offset"}, {56, 8, 0, "bytes"}, {56, 8, UINT64_MAX, "bytes"},
        {56, 8, (uint64_t)1 << 40, "bytes"}};
    uint32_t n = read_u32(whole->p + 40);
    for (uint32_t t = 0; t < n; t += t < 3 || t + 6 > n ? 1 : 3)
        for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
            if (entries[i].value != BYTES || read_u32(whole->p + 512 + 64 * t + 32) != BYTES)
                changed(whole, 512 + 64 * t + entries[i].offset, entries[i].size, entries[i].value,
                        false, text("in tensor %u %s", t, entries[i].name));
    changed(whole, 512 + 48, 8, whole->n, false, "a tensor that starts at its end, offset");
    changed(whole, 40, 4, n + 1, false, "one tensor more, n_tensors");
    for (uint32_t t = 0; t < n; t++) {  // one is there twice, and another is not
        Buffer b = copy(whole);
        memcpy(b.p + 512 + 64 * t, whole->p + 512 + 64 * ((t + 1) % n), 64);
        seal(&b);
        damaged(&b, false, "a model with tensor %u twice", (t + 1) % n);
    }
}

static void test_tokenizer_files(void) {
    Buffer whole = slurp("tiny.tok");
    Made made = tiny_model(LLAMA, Q8);  // without a fingerprint: any tokenizer of its size will do
    Buffer model = version_5(&made);
    damaged_file = "damaged.tok";
    keep("any.bin", &model), keep(damaged_file, &whole);
    Ran r = ran(TOKENIZE);
    CHECK(r.status == 0 && r.out.n > 4 && lines(&r.out) == 1, "ids are one line: %s", r.err.p);
    for (size_t i = 0; i < whole.n; i += i < 100 ? 1 + i % 3 : 61) {
        Buffer b = copy(&whole), cut = bytes_of(whole.p, i);
        b.p[i] ^= (uint8_t)(1 << i % 8);
        damaged(&b, false, "a tokenizer with byte %zu changed", i);
        if (i < 16) continue;
        set64(b.p + 8, hash64(b.p + 16, b.n - 16));
        damaged(&b, true, "a tokenizer with byte %zu changed under a right hash", i);
        damaged(&cut, false, "a tokenizer cut to %zu bytes", i);
        if (i >= 112) set64(cut.p + 8, hash64(cut.p + 16, cut.n - 16));
        damaged(&cut, false, "a tokenizer cut to %zu bytes under a right hash", i);
    }
    static const int64_t values[] = {-1, 0, INT_MAX, INT_MIN, 1 << 20, 1 << 28, 0x1fffffff};
    for (int offset = 16; offset < 72; offset += 4)
        for (int i = 0; i < 7; i++) {
            Buffer b = copy(&whole);
            set32(b.p + offset, values[i]);
            set64(b.p + 8, hash64(b.p + 16, b.n - 16));
            bool number = offset == 16 || offset >= 36;  // of tokens or other entries
            damaged(&b, !number || (values[i] == 0 && offset != 16), "a tokenizer with %lld at %d",
                    (long long)values[i], offset);
        }
    static const struct { int offset; float value; } odd[] = {  // what it recommends
        {72, 2e9f}, {72, NAN}, {84, 1.5f}, {84, INFINITY}, {88, 1e-4f}, {88, 1e4f}};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        Buffer b = copy(&whole);
        set_float(b.p + odd[i].offset, odd[i].value);
        set64(b.p + 8, hash64(b.p + 16, b.n - 16));
        damaged(&b, false, "a tokenizer with %g at %d", (double)odd[i].value, odd[i].offset);
    }
    Buffer longer = copy(&whole);
    put(&longer, NULL, 64), set64(longer.p + 8, hash64(longer.p + 16, longer.n - 16));
    damaged(&longer, false, "a padded tokenizer under a right hash");
    Vocabulary *v = tiny_vocabulary();
    v->ranges.n = 0, v->n_ranges = 0;  // one that knows no spaces must not run off the text
    for (int i = 0; i < 2; i++) {
        v->n_steps = 0, v->steps.n = 0;
        split(v, 15, i ? cl100k_pattern : gpt2_pattern, i);
        Buffer file = tokenizer_file(v);
        keep("damaged.tok", &file);
        prints("a tokenizer without character classes works", "32\n",
               "run any.bin -z damaged.tok -m tokenize -i ' '");
    }
    v = new_vocabulary(SENTENCEPIECE);
    all_bytes(v);
    for (int i = 256; i < 278; i++) word(v, "ab", NORMAL);
    Buffer strange = tokenizer_file(v);
    v = tiny_vocabulary();
    v->n_steps = 0, v->steps.n = 0;
    split(v, 15, "L*L*L*L*L*L*L*L*N", false);
    Buffer slow = tokenizer_file(v);
    keep("damaged.tok", &slow);
    refused(1, "damaged.tok: its patterns take too long", "head -c 2000 /dev/zero | tr '\\000' x | "
            "run any.bin -z damaged.tok -f - -m tokenize");
    damaged(&strange, true, "an unusual tokenizer");
    refused(1, "damaged.tok is not this model's", "run tiny.bin -z damaged.tok -i a");
    refused(1, "empty is empty", "true >empty; run any.bin -z empty -i a");
    refused(1, ". is not a file", "run any.bin -z . -i a");
    refused(1, "cannot open nothing", "run any.bin -z nothing -i a");
    Buffer older = copy(&whole);
    older.p[3] = '3';
    damaged(&older, false, "a tokenizer of an older version");
    refused(1, "export.py makes it anew", TOKENIZE);
    refused(1, "any.bin", "rm -f any.tok; run any.bin -i a");
    refused(1, "any.tok", "head -c 100 tiny.tok >any.tok; run any.bin -i a");
    prints("the first tokenizer that fits is taken", "97\n",
           "cp tiny.tok tokenizer.bin; run any.bin -i a -m tokenize; rm tokenizer.bin any.tok");
    damaged_file = "damaged.bin";
}

static void test_llama2c_files(void) {
    Shape s = family(LLAMA, ROWS);
    s.vocab = 266, s.layers = 1, s.seq_len = 64;
    for (int version = 0; version < 2; version++) {
        s.features = version ? TIED : 0;
        Made m = make_weights(&s);
        Buffer whole = llama2c_file(&m, version);
        keep("v.bin", &whole);
        Ran r = ran(LOGITS_OF("v.bin"));
        CHECK(r.status == 0 && r.out.n == 3 * 266 * 4, "a version %d model gives logits: %s",
              version, r.err.p);
        refused(1, "v.bin", "run v.bin -m check");
        test_cuts(&whole, version);
        static const int64_t values[] = {0, -1, INT_MAX, INT_MIN, 1 << 20, 65535};
        for (int field = 0; field < 7; field++)
            for (int i = 0; i < 6; i++) {
                Buffer b = copy(&whole);
                set32(b.p + 8 * version + 4 * field, values[i]);
                // version 0 holds tables as long as its context
                damaged(&b, version == 1 && field == 6 && values[i] > 0 && values[i] <= 1 << 24,
                        "a version %d header with %lld in field %d", version, (long long)values[i],
                        field);
            }
    }
}

static void test_files(void) {
    if (no_program()) return;
    Buffer tiny = slurp("tiny.bin"), b = {0};
    test_whole_files();
    refused(1, "cannot open missing.bin", LOGITS_OF("missing.bin"));
    refused(1, ". is not a file", LOGITS_OF("."));
    refused(1, "empty is empty", "true >empty; " LOGITS_OF("empty"));
    refused(1, "words is not a model (export.py makes one), or damaged\n",
            "echo 'Once upon a time there was a text' >words; " LOGITS_OF("words"));
    refused(1, "export.py", "echo GGUF: what others publish >a.gguf; " LOGITS_OF("a.gguf"));
    for (int version = 2; version < 7; version++) {
        if (version == 5) continue;
        b = copy(&tiny);
        set32(b.p + 4, version);
        keep("version.bin", &b);
        refused(1, version < 5 ? "export.py" : "version 6", LOGITS_OF("version.bin"));
    }
    refused(1, "locked.bin", "cp tiny.bin locked.bin; chmod 0 locked.bin; "  // but of root
                             "test -r locked.bin && rm locked.bin; " LOGITS_OF("locked.bin"));
    test_cuts(&tiny, 5);
    test_flips(&tiny);
    test_fields(&tiny);
    test_tokenizer_files();
    test_llama2c_files();
    for (int odd = 0; odd < 2; odd++) {  // files that agree with themselves, but not with the rules
        Shape s = family(LLAMA, Q8);
        if (odd) s.head_dim = 15;
        else s.kv_heads = 3;
        Made strange = make_weights(&s);
        b = version_5(&strange);
        damaged(&b, false, odd ? "an odd head size" : "a model of 4 query heads for 3 key heads");
    }
    for (int i = 0; i < 9; i++) {
        Made m = tiny_model(LLAMA, F32);
        Tensor *norms[] = {&m.final_norm, &m.layer[0][ATTN_NORM], &m.layer[0][FFN_NORM]};
        norms[i / 3]->values[3] = (float[]){INFINITY, NAN, -1e30f}[i % 3];
        b = version_5(&m);
        damaged(&b, i % 3 == 2 && i > 2, "a model with a weight that is no number, %d", i);
    }
    // NaN with a payload, and infinity, in a matrix: of F32, of BF16, as a half-precision scale.
    static const int tensors[] = {WQ, WK, WV, WO, GATE, UP, DOWN};
    static const uint32_t odd[][3] = {{0x7fc00180, 0x7fc1, 0x7e01}, {0xff800000, 0x7f80, 0x7c00}};
    for (int dtype = F32; dtype <= Q4A; dtype++)
        for (int i = 0; i < 14; i++) {
            Made m = tiny_model(LLAMA, dtype);
            const uint32_t *bits = odd[i / 7];
            uint32_t put_ = bits[dtype == F32 ? 0 : dtype == BF16 ? 1 : 2];
            memcpy(m.layer[0][tensors[i % 7]].bytes, &put_, dtype == F32 ? 4 : 2);
            b = version_5(&m);
            damaged(&b, false, "a model of %s with %x in %s", dtype_names[dtype], put_,
                    tensor_names[tensors[i % 7]]);
        }
}

// ==== 8. Commands ================================================================================

// Wrong command lines: what is behind the model's name, and a text of the line that refuses it.
static const struct { const char *words, *says; } wrong_words[] = {
    {"-n", "-n needs a value"}, {"-i", "-i needs a value"}, {"-s", "-s needs a value"},
    {"--prompt", "--prompt needs a value"}, {"-n abc", "-n goes from 0 to 1000000000, not \"abc\""},
    {"-n 1x", "not \"1x\""}, {"-n ''", "-n"}, {"-n ' 5'", "not \" 5\""},
    {"-n -1", "-n goes from 0 to"}, {"-n 1.5", "not \"1.5\""},
    {"-n 99999999999999999999", "-n goes from"}, {"-t nan", "-t goes from 0"},
    {"-t -0.1", "-t goes from"}, {"-t inf", "-t goes from"}, {"-t 1,5", "not \"1,5\""},
    {"-p 1.01", "-p goes from 0 to 1"}, {"-p nan", "-p goes"},
    {"-s -1", "-s goes from 0 to 1.84"}, {"-s 99999999999999999999", "-s goes"},
    {"-s 1.0", "not \"1.0\""}, {"-s ''", "-s"}, {"-c -5", "-c goes"}, {"-c x", "not \"x\""},
    {"-j 0", "-j goes from 1 to 256"}, {"-j 1000", "-j goes"}, {"-j two", "not \"two\""},
    {"--top-k -1", "--top-k goes"}, {"--top-k 1e3", "not \"1e3\""}, {"--min-p 2", "--min-p goes"},
    {"--repeat-penalty 0", "--repeat-penalty goes"}, {"-x", "unknown option -x;"},
    {"-v", "unknown option -v: there is -V;"},
    {"\"$(printf -- '--a\\nb\\033[31m')\"", "unknown option --a?b?[31m;"},
    {"--completion tcsh", "bash, zsh or fish, not tcsh"},
    {"--unknown", "unknown option --unknown"}, {"-- -q", "models, tiny.bin and -q"},
    {"--steps=x", "not \"x\""},
    {"--steps=", "needs a value"}, {"--quiet=1", "--quiet=1 takes no value"},
    {"--step 5", "unknown option --step: there is --steps;"}, {"another.bin", "-i is a text"},
    {"-m unknown", "unknown mode unknown"}, {"-m check -i x", "-i means nothing in mode check"},
    {"-m ''", "-m"},
    {"-m Generate", "unknown mode Generate"}, {"-i a -f b", "-i and -f"}, {"-i a -o ''", "-o"},
    {"-b", "-b picks"}, {"-k 2 -e x", "-e cannot be used with -k"}, {"-k 2 -d lookup", "-k and -d"},
    {"--suffix a -S kv", "--suffix goes without"}, {"-m chat --suffix a", "--suffix means nothing"},
    {"-e x -S y", "-e cannot"}, {"-e x -d lookup", "-e cannot"}, {"-k 0", "-k goes from 1 to 256"},
    {"-k 257", "-k goes"}, {"-y x", "-y means nothing in mode generate"},
    {"-m eval -k 2", "-k means nothing in mode eval"}, {"-m chat -k 2", "-k in a chat needs -b"},
    {"-m chat -e x", "-e means nothing in mode chat"}, {"-m logits -d lookup", "-d means nothing"},
    {"-m bench -S x", "-S means nothing"}, {"-m check -T x", "-T means nothing"},
    {"-m tokenize --think", "--think means nothing"}, {"-m logits --receipt", "--receipt means"},
    {"-m eval -n 3", "-n means nothing"}, {"-m compress -t 0", "-t means nothing"}, {"-f ''", "-f"},
    {"--session= -S", "--session="}, {"-i a --trace -m generate", "--trace means"},
    {"-m eval -i a --layer 0", "--layer means"},
    {"-m explain -i a --head 0", "--head needs --layer"},
    {"-m explain -i a --layer -1", "--layer goes"}, {"-m explain -i a --layer x", "not \"x\""},
    {"-m explain -i a --layer 0 -o page", "--layer means nothing in a page"},
    {"-m explain -i a -o tiny.bin", "-o tiny.bin would overwrite tiny.bin"},
    {"-m logits -i 1 -o ./tiny.bin", "would overwrite"}, {"-S kv -o kv", "would overwrite"},
    {"-m logits -i 1 -o $PWD/tiny.bin", "would overwrite"}, {"-S ./text -o $PWD/text", "overwrite"},
    {"-m logits -i 1 -o link.bin", "would overwrite"},
    {"-m compress -f text -o text", "would overwrite"},
    {"-m tokenize -i a -o tiny.tok", "-o tiny.tok would overwrite tiny.tok"},
    {"-i a -k 2 --reward text -o text", "-o text would overwrite text"},
    {"-m tokenize -f - -o text <text", "-o text would overwrite /dev/stdin"}};

// Commands that end with status 1, and what they say.
static const struct { const char *command, *says; } failing[] = {
    {"t -m tokenize -f nothing", "cannot open nothing"}, {"t -m tokenize -f .", "cannot read ."},
    {"t -n 5 -f long", "context"}, {"t -i eeeeeeeeee -c 5", "context"},
    {"t -i e -c 701", "-c 701 is more than the 700 positions"}, {"t -m logits -i '1 2 x'", "x"},
    {"t -m logits -i -1", "-1"}, {"t -m logits -i 278", "278"},
    {"t -m logits -i '1 99999999999999'", "99"}, {"t -m logits -i 1,2", ",2"},
    {"t -m logits -i ''", "id"}, {"t -m logits -i 1.5", ".5"}, {"t -m logits -i 0x10", "x10"},
    {"t -m eval", "eval"}, {"t -m decompress -i abc", "the text of -i"},
    {"t -m logits -i 1 -o no/folder", "cannot write no/folder"},
    {"t -m logits -i 1 -o .", "cannot write ."}, {"e -i a --suffix b", "no tokens for --suffix"},
    {"e -i a -n 2 -o $(printf %0256d 0)", "too long"},
    {"t -m explain -i abc -o no/page -q", "cannot write no/page"},
    {"t -m explain -i a --layer 1", "layer"}, {"t -m explain -i a --layer 0 --head 4", "head"},
    {"run plain.bin -m chat -i a", "chat"}, {"echo Z | run wordless.bin -m chat -q", "wordless"},
    {"e -i a -d nothing.bin", "cannot open nothing.bin"},
    {"e -i a -d llama.bin", "another tokenizer"},
    {"e -i a -e nothing.bin", "cannot open nothing.bin"},
    {"e -q -f hundreds -n 5 -e other.bin", "other.bin"}, {"t -m decompress -f text", "text"},
    {"t -m logits -i \"$(printf '\\033[31m\\302\\233')\"", "\"?[31m?"},
    {"chat <.", "cannot read stdin"}, {"e -n 1 -o dangling", "a link to what is not there"},
    {"t -m decompress -f small.bad -o out", "small.bad"}, {"e -m decompress -f small", "small"}};

// Pairs of commands that print the same bytes.
static const struct { const char *what, *one, *other; } twins[] = {
    {"--help is printed to stdout", "run --help | head -c 6", "printf usage:"},
    {"and nothing to stderr", "run -h 2>&1", "run --help"},
    {"so is the version", "run -V 2>&1", "run --version"},
    {"-i - is stdin", "t -m tokenize -i - <text", "t -m tokenize -f text"},
    {"-f - is stdin", "t -m tokenize -f - <text", "t -m tokenize -f text"},
    {"a pipe is read in every mode that takes a text", "for m in tokenize eval explain; do t -m $m "
     "-s 1 <text; done 2>/dev/null; echo 1 2 | t -m logits", "t -m tokenize -f text; t -m eval -f "
     "text; t -m explain -f text -s 1 2>/dev/null; t -m logits -i '1 2'"},
    {"long names and any order do the same", "run --mode=tokenize --file text tiny.bin",
     "t -m tokenize -f text"},
    {"-o is what stdout would be", "t -m logits -i '1 2 3' -o out; cat out",
     "t -m logits -i '1 2 3'"},
    {"-o writes where a link leads to", "rm -f out; ln -s far link; echo >far; e -i a -n 5 -s 1 "
     "-o link; test -h link && cat far", "e -i a -n 5 -s 1"},
    {"a device as -o is written to", "ln -s /dev/stdout null; e -i a -n 5 -s 1 -o null",
     "e -i a -n 5 -s 1"},
    {"-o keeps a file's mode", "rm -f out; echo >out; chmod 640 out; e -n 2 -s 1 -o out; ls -l "
     "out | cut -c 1-10", "echo -rw-r-----"},
    {"a new -o has the usual mode",
     "rm -f out; umask 027; e -n 2 -s 1 -o out; ls -l out | cut -c 1-10", "echo -rw-r-----"},
    {"a name can have 255 bytes", "f=$(printf %0255d 0); e -i a -n 5 -s 1 -o $f; cat $f; rm $f",
     "e -i a -n 5 -s 1"},
    {"-- ends the options", "run -n 5 -s 1 -i abc -- endless.bin", "e -n 5 -s 1 -i abc"},
    {"--suffix: the middle alone is printed", "run filling.bin -i ab --suffix cad -n 9 -t 0",
     "run filling.bin -i '<s>ab<|end|>cad' -n 9 -t 0 | tail -c +16"},
    {"a suffix may come first", "run turned.bin -i ab --suffix cad -n 9 -t 0",
     "run filling.bin -i '<s>cad<|end|>ab' -n 9 -t 0 | tail -c +16"},
    {"a line without a word is no turn", "printf '\\nab\\n' | e -m chat --each - -n 9 -t 0 -q | "
     "head -n 1", "echo"},
    {"-m logits on three threads", "t -m logits -f ids -j 3", "t -m logits -f ids -j 1"},
    {"generate writes the prompt first", "e -i abc -n 5 -s 1 -q | head -c 3", "printf abc"},
    {"a seed from the clock is told, and writes the same text when given", "e -i abc -n 9 2>told",
     "e -i abc -n 9 -s $(sed -n 's/seed: //p' told)"},
    {"temperature 0 needs no seed", "e -i abc -n 5 -t 0", "e -i abc -n 5 -t 0 -s 9"},
    {"a closed pipe ends generation quietly",
     "{ e -i abc -n 900 -s 1 -q 2>&1; echo $? >&2; } 2>told | true; cat told", "echo 0"},
    {"a closed pipe ends explain quietly",
     "{ t -m explain -i abc -n 50 -s 1 -q 2>&1; echo $? >&2; } 2>told | true; cat told", "echo 0"},
    {"-o can have a name of 255 bytes", "n=$(printf %0255d 0); e -i abc -n 5 -s 1 -o $n; cat $n; "
     "rm $n", "e -i abc -n 5 -s 1"},
    {"a thought that the context has lost goes on in the next run", "rm -f kv; { e -c 40 -S kv -i "
     "'a<think>' -n 60 -s 1 -q; e -c 40 -S kv -n 20 -q; } | tr -d '\\n'", "e -c 40 -i 'a<think>' "
     "-n 80 -s 1 -q | tr -d '\\n'"},
    {"a text that goes nowhere is an error", "e -n 5 -s 1 -q 2>/dev/null >&-; echo $?", "echo 1"},
    {"samples may end at different times", "t -i ab -n 40 -s 5 -k 2 -q -o both; head -c $(t -i ab "
     "-n 40 -s 5 -q | wc -c) both", "t -i ab -n 40 -s 5 -q"},
    {"256 samples at once", "e -i abc -n 3 -s 1 -k 256 2>&1 >/dev/null | grep -c sample",
     "echo 256"},
    // sessions
    {"logits in two runs on a session", "rm -f kv; e -m logits -S kv -i '1 2 3' -c 2000; e -m "
     "logits -S kv -i '4 5 6 7'", "e -m logits -i '1 2 3 4 5 6 7'"},
    {"a thought may begin in an earlier run",
     "rm -f kv; e -S kv -i 'x<think>y' -n 5 -s 1 >/dev/null; e -S kv -n 5 -s 1", "echo"},
    {"a session of llama2.c's file goes on", "rm -f kv; { run llama.bin -S kv -i abc -n 30 -t 0.5 "
     "-s 5; run llama.bin -S kv -n 10 -t 0.5; } | tr -d '\\n'",
     "run llama.bin -i abc -n 40 -t 0.5 -s 5 | tr -d '\\n'"},
    {"samples branch from a session", "rm -f kv; e -S kv -i abc -n 30 -s 1 -t 0 | tr -d '\\n'; e "
     "-S kv -n 20 -t 0 -k 3 -b | tr -d '\\n'; e -S kv -n 9 -t 0 | tr -d '\\n'",
     "e -i abc -n 59 -t 0 | tr -d '\\n'"},
    {"the best sample becomes the session's text",
     "rm -f kv; e -S kv -i abc -n 20 -s 3 -k 3 -b; e -S kv -n 20 -t 0",
     "rm -f kv; e -S kv -i abc -n 20 -s $(best $E -i abc -n 20 -s 3 -k 3); e -S kv -n 20 -t 0"},
    {"a session on a full disk is an error",
     "rm -f kv; (ulimit -f 40; e -S kv -n 3 -i abc -q >/dev/null 2>&1; echo $?)", "echo 1"},
    {"and what it leaves opens", "rm -f kv; (ulimit -f 40; e -S kv -n 3 -i abc -q >/dev/null "
     "2>&1); e -S kv -n 9 -q >/dev/null; echo $?", "echo 0"},
    {"a closed stdout does not become the session's file", "rm -f kv; e -S kv -i abc -n 5 -t 0 -q "
     "-c 999 >&- 2>/dev/null; echo $?; rm -f kv; e -S kv -i abc -n 5 -t 0 -q -c 999",
     "echo 1; e -i abc -n 5 -t 0"},
    // ensembles
    {"an ensemble reads stdin", "printf abc | e -i - -n 20 -s 2 -e tiny.bin",
     "e -i abc -n 20 -s 2 -e tiny.bin"},
    {"the other answers are told", "e -i abc -n 20 -s 2 -e tiny.bin 2>&1 >/dev/null | grep -c "
     "'^not chosen: abc'", "echo 1"},
    {"two equal models answer as one", "e -i abc -n 20 -s 2 -e $E", "e -i abc -n 20 -s 2"},
    // chat: the files one, two and other hold what replies to "abc", then "def", then "ddd" are
    {"a reply is what follows the rendered turn", "echo abc | chat",
     "e -i '<s>abc<|end|>' -n 12 -t 0 | tail -c +14"},
    {"-y is the system turn", "echo abc | chat -y be",
     "e -i '<s>system be<|end|><s>abc<|end|>' -n 12 -t 0 | tail -c +33"},
    {"empty lines are no turns, nor is a newline needed", "printf 'abc\\r\\n\\ndef' | chat",
     "cat two"},
    {"-i is the first turn", "echo def | chat -i abc", "cat two"},
    {"a chat format without a place for a system turn refuses /system, too", "printf '/system "
     "be\\nabc\\n' | run nowhere.bin -m chat -n 12 -t 0 -q -c 999 --repeat-penalty 1 2>told; grep "
     "-c place told", "cat one; echo 1"},
    {"/undo takes a turn back", "printf 'abc\\nddd\\n/undo\\ndef\\n' | chat",
     "cat other; rest one two"},
    {"/again answers the last turn anew", "printf 'abc\\nddd\\n/again\\n' | chat",
     "printf 'abc\\nddd\\n' | chat >out; cat out; rest one out"},
    {"but not another one", "printf 'abc\\nddd\\n/undo\\n/again\\ndef\\n' | chat; test $? = 1",
     "cat other; rest one two"},
    {"/system begins another conversation", "printf 'ddd\\n/system be\\nabc\\n/stats\\n' | chat",
     "echo ddd | chat; echo abc | chat -y be"},
    {"/set changes how answers are drawn", "printf '/set temperature 2\\n/set top-k 1\\nabc\\n' | "
     "chat", "cat one"},
    {"/clear begins anew", "printf 'ddd\\n/clear\\nabc\\ndef\\n' | chat",
     "echo ddd | chat; cat two"},
    {"/save and /load bring a conversation back", "rm -f saved; printf 'abc\\n/save "
     "saved\\nddd\\n/load saved\\ndef\\n' | chat", "cat other; rest one two"},
    {"-S goes on with a saved conversation", "rm -f saved; printf 'abc\\n/save saved\\n' | chat "
     ">/dev/null; echo def | chat -S saved", "rest one two"},
    {"a chat that rewrites its history goes on in a session", "rm -f kv; for i in abc def dad; do "
     "echo $i | settling -y be -S kv; done", "printf 'abc\\ndef\\ndad\\n' | settling -y be"},
    {"and /undo takes its turns back", "printf 'abc\\ndad\\n/undo\\ndad\\n' | settling >out; "
     "printf 'abc\\ndad\\n' | settling >out2; rest out2 out",
     "printf 'abc\\ndad\\n' | settling >out; printf 'abc\\n' | settling >out2; rest out2 out"},
    {"speculation in a chat", "printf 'abc\\ndef\\n' | chat -d lookup", "cat two"},
    {"a chat goes on after what failed, and ends with status 1", "printf 'abc\\n/load /nowhere\\n"
     "/save /nowhere/x\\n/help\\n/bad\\n/save\\n/save -\\n/set top-p 2\\n/set repeat-penalty "
     "1e-30\\ndef\\n' | chat; test $? = 1", "cat two"},
    {"/save and /load without a name say so", "printf '/save\\n/load \\nabc\\n' | chat 2>told; "
     "grep -c 'needs the name of a file' told", "cat one; echo 2"},
    {"and leaves -o's old file alone", "for line in '/load /nowhere' '/save /nowhere/x' /bad /undo "
     "$(printf %02000d 0); do echo mine >said; echo \"$line\" | chat -o said; echo $?; cat said; "
     "done", "for i in 1 2 3 4 5; do echo 1; echo mine; done"},
    {"// sends a message that begins with /", "echo //abc | chat",
     "e -i '<s>/abc<|end|>' -n 12 -t 0 | tail -c +15"},
    {"lines that end in \\ and lines between \"\"\" are one message", "printf '/a\\\\\\n/b\\n' | "
     "sed s:^/a:a: | chat; printf '\"\"\"\\n/a\\\\\\n\\n/b\\n\"\"\"\\n' | chat", "chat -i \"$("
     "printf 'a\\n/b')\" </dev/null; chat -i \"$(printf '/a\\\\\\n\\n/b')\" </dev/null"},
    {"a byte order mark before a prompt is no part of it", "printf '\\357\\273\\277abc' >marked; "
     "chat -f marked </dev/null; e -f marked -n 9 -t 0", "echo abc | chat; e -i abc -n 9 -t 0"},
    {"but part of a text to compress", "printf '\\357\\273\\277abc' >marked; t -m compress -f "
     "marked | t -m decompress", "cat marked"},
    {"a chat format without a place for a system turn says so", "echo abc | run nowhere.bin -m "
     "chat -n 12 -t 0 -q -c 999 --repeat-penalty 1 -y be 2>told; wc -l <told", "cat one; echo 1"},
    {"without thoughts in the chat format <think> is text", "run nowhere.bin -i 'a<think>b' -n 1 "
     "-t 0", "run nowhere.bin -i 'a<think>b' -n 1 -t 0 --think"},
    {"a text that ends within a thought says so", "e -i 'a<think>b' -n 1 -q 2>&1 >/dev/null | grep "
     "-c thought; e -i 'a<think>b</think>' -n 1 -q 2>&1 >/dev/null | wc -l", "echo 1; echo 0"},
    {"and so does a line's answer", "echo 'a<think>b' | e --each - -n 1 -q 2>&1 >/dev/null | grep "
     "-c thought", "echo 1"},
    {"a file that is no session stays as it is", "echo mine >notes; printf 'abc\\n/save "
     "notes\\n/load notes\\ndef\\n' | chat; cat notes", "cat two; echo mine"},
    {"files in use stay as they are", "rm -f kv; cp $E before; printf 'abc\\n/save kv\\n/load "
     "kv\\n/save endless.bin\\ndef\\n' | chat -S kv; cmp before $E", "cat two"},
    {"the best of four in a chat is that of the rendered turn", "echo abc | e -m chat -n 12 -s 5 "
     "-t 1 --repeat-penalty 1 -k 4 -b", "e -i '<s>abc<|end|>' -n 12 -s 5 -k 4 -b | tail -c +14"},
    {"a chat that is cut between turns, with room for 40 tokens", "for n in $(seq 1 40); do rm -f "
     "kv; echo abc | chat -n $n -c 40 -S kv; echo def | chat -n $n -c 40 -S kv; done",
     "for n in $(seq 1 40); do printf 'abc\\ndef\\n' | chat -n $n -c 40; done"},
    {"/undo in a session is kept", "rm -f kv; printf 'abc\\nddd\\n/undo\\n' | chat -S kv; echo "
     "def | chat -S kv", "cat other; rest one two"},
    {"a turn that cannot fit is left out",
     "printf '%0200000d\\n' 0 | chat -c 900 2>&1 >out | wc -l; wc -c <out", "echo 1; echo 0"},
    // tools
    {"a tool's answer goes on the text, and the model from there",
     "e -T 'tr 1 7' -i '12*34=' -n 5 -t 0", "e -i '12*34=72*34\n' -n 5 -t 0"},
    {"an answer is only text", "e -T \"echo '\\$(touch x); \\`ls\\`'\" -i '1+1=' -n 1 -t 0 | head "
     "-c 20", "printf '1+1=$(touch x); `ls`'"},
    {"an answer is not cut",
     "e -T 'seq 2000' -i '1+1=' -n 1 -t 0 2>&1 >/dev/null | grep -c 'says too much'", "echo 1"},
    {"a tool may leave a child behind", "e -T 'sleep 8 & echo 7' -i '1+1=' -n 1 -t 0 | head -c 5",
     "printf '1+1=7'"},
    {"a question may begin in an earlier run", "rm -f kv; e -m logits -S kv -o out -i \"$(e -m "
     "tokenize -i '12*3')\"; e -S kv -i '=' -n 1 -T \"tr '*' x\" | head -c 6", "printf '=12x3\n'"},
    {"samples in which a tool speaks at length are the single runs",
     "tooled -s 152 -k 2 2>&1 >out; cat out; head -c 9 out", "for s in 152 11400714819323198637; "
     "do tooled -s $s 2>&1 >out$s; done; cat out152 out11400714819323198637; printf '1+1=a b c'"},
    // explain
    {"a trace on three threads, in a file", "e -m explain -i abc -s 3 -c 99 --trace -n 3 -j 3 -o "
     "out; cat out", "e -m explain -i abc -s 3 -c 99 --trace -n 3"},
    {"the only layer is the mean of all", "e -m explain -i abc -s 3 -c 99 -n 9 --layer 0",
     "e -m explain -i abc -s 3 -c 99 -n 9"},
    // compression
    {"a text comes back", "t -m compress -f text | t -m decompress", "cat text"},
    {"a file comes back", "t -m compress -f text -o small -j 3; t -m decompress -f small -o out "
     "-j 1; cat out", "cat text"},
    {"-i, -f and stdin compress alike", "printf dad | t -m compress; printf dad >in; t -m "
     "compress -f in", "t -m compress -i dad; t -m compress -i dad"}};

// Commands whose text does not depend on how it is computed: $S is how it is drawn, and %s what is
// added. stderr has the receipts.
static const char speak[] = "e -i 'abc abc abc' -n 150 -s 9 -q --receipt $S";
static const char *const settings[] = {"-t 0", "-t 1 -p 0.9", "-t 0.5 -p 1 --top-k 20",
                                       "-t 0 -c 40", "-t 1 -p 1 -c 40 --repeat-penalty 1.2"};
static const char *const ways[] = {"-j 1", "-j 3", "-j 64", "-d endless.bin", "-d other.bin -j 2",
                                   "-d lookup", "-d lookup -j 3", "-S new", "-S new2 -d lookup",
                                   "-k 1", "-T false"};
static void test_ways(void) {
    for (size_t s = 0; s < sizeof settings / sizeof *settings; s++) {
        setenv("S", settings[s], 1);
        Ran expected = SH("%s 2>&1", speak);
        CHECK(expected.status == 0 && expected.out.n > 150, "%s: %s", settings[s], expected.out.p);
        for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
            char *command = text("rm -f new new2; %s %s 2>&1", speak, ways[w]);
            if (cut_out(command)) continue;
            Ran r = ran(command);
            CHECK(r.status == 0 && equal(&r.out, &expected.out),
                  "%s with %s: the same text and receipt: status %d, %.300s", settings[s], ways[w],
                  r.status, r.out.p);
        }
        same(text("four runs on a session write what one run does (%s)", settings[s]),
             "rm -f kv; { e $S -S kv -i 'abc abc abc' -n 1 -s 9; e $S -S kv -n 60; "
             "e $S -S kv -n 57 -d lookup; e $S -S kv -n 32; } | tr -d '\\n'",
             "e $S -i 'abc abc abc' -n 150 -s 9 | tr -d '\\n'");
        same(text("each sample is the run with its seed (%s)", settings[s]),
             "e -i abc -n 70 -s 77 $S -k 3 -j 2 --receipt 2>&1 >out | grep receipt; cat out",
             "for s in 77 11400714819323198562 4354685564936845431; do "
             "e -i abc -n 70 -s $s $S -q --receipt 2>&1 >out$s; done; "
             "cat out77 out11400714819323198562 out4354685564936845431");
        same(text("-b prints the likeliest (%s)", settings[s]),
             "e -i abc -n 70 -s 77 $S -k 3 -b",
             "e -i abc -n 70 -s $(best $E -i abc -n 70 -s 77 $S -k 3) $S");
    }
    unsetenv("S");
}

// Threads are as many as the processors that the program may use.
static void test_processors(void) {
#ifdef __linux__
    cpu_set_t all, one;
    int usual = processors();
    sched_getaffinity(0, sizeof all, &all);
    CPU_ZERO(&one);
    for (int i = 0; !CPU_COUNT(&one); i++) if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    sched_setaffinity(0, sizeof one, &one);
    CHECK(processors() == 1 && usual <= CPU_COUNT(&all), "the affinity mask counts");
    sched_setaffinity(0, sizeof all, &all);
#endif
}

// Commands that have more to say than the text.
static const char *const loquacious[] = {
    "run endless.bin -i abc -n 5", "run endless.bin -i abc -n 9 -d lookup", "run tiny.bin -m check",
    "run endless.bin -i abc -n 5 -k 3 -b", "run endless.bin -i abc -n 5 -e other.bin -s 1",
    "run endless.bin -i abc -n 99 -c 20", "run endless.bin -m chat -i abc -n 5",
    "run tiny.bin -m compress -f text -o out", "run endless.bin -n 5 --each ids"};
// The manual page and the completions have all options and modes, in quotes that nothing breaks.
static void test_tables(void) {
    const char *commands[] = {"run --manual", "run --completion bash", "run --completion zsh",
                              "run --completion fish"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        Ran r = ran(commands[i]);
        int missing = r.status != 0 || r.err.n;
        for (int k = 0; k < N_OPTIONS; k++) {
            const char *word = options[k].name + (i == 3 ? 6 : 4);
            missing += options[k].modes && !strstr((char *)r.out.p, text("%.*s", (int)strcspn(word,
                                                                         " "), word));
            missing += strpbrk(options[k].help, "\"$`\\[]") || strchr("'.", *options[k].help);
        }
        for (int k = 0; k < N_MODES; k++)
            missing += modes[k].name && !strstr((char *)r.out.p, modes[k].name);
        CHECK(!missing, "%s names every option and mode: %d do not fit", commands[i], missing);
    }
}

static void test_commands(void) {
    test_processors();
    if (no_program()) return;
    test_tables();
    refused(2, "no model is named", "run");
    refused(2, "no model is named", "run -n 5");
    Ran made = ran("echo 'abc caf\303\251 <s> 12, bad cab' >text; rm -f kv out page; "
                   "ln -s tiny.bin link.bin; ln -s far dangling; printf %03000d 0 >long; "
                   "seq 1 200 >ids; "
                   "printf %0300d 0 >hundreds; "
                   "run tiny.bin -m compress -f text -o small && head -c 20 small >small.bad; "
                   "echo abc | chat -o one; printf 'abc\\ndef\\n' | chat -o two; "
                   "printf 'abc\\nddd\\n' | chat -o other");
    CHECK(made.status == 0 || cut_out("chat"), "files for commands are made: %s", made.err.p);
    for (size_t i = 0; i < sizeof wrong_words / sizeof *wrong_words; i++)
        refused(2, wrong_words[i].says, text("run tiny.bin %s", wrong_words[i].words));
    int files = files_here();
    for (size_t i = 0; i < sizeof failing / sizeof *failing; i++)
        refused(1, failing[i].says, failing[i].command);
    CHECK(files_here() == files, "what failed leaves no file, not even a part of one");
    for (size_t i = 0; i < sizeof twins / sizeof *twins; i++)
        same(twins[i].what, twins[i].one, twins[i].other);
    for (size_t i = 0; i < sizeof loquacious / sizeof *loquacious; i++) {
        if (cut_out(loquacious[i])) continue;
        Ran loud = ran(loquacious[i]), quiet = ran(text("%s -q", loquacious[i]));
        CHECK(!loud.status && loud.err.n && !strchr((char *)loud.err.p, '\r'),
              "%s draws no progress in a file: %s", loquacious[i], loud.err.p);
        CHECK(!quiet.status && !quiet.err.n, "%s -q says nothing: %s", loquacious[i], quiet.err.p);
    }
    test_ways();
    if (getenv("PATIENCE")) {
        skip(2, "limited memory, of which sanitizers need a lot: make test has it");
        return;
    }
    refused(1, "out of memory", "head -c 99999999 /dev/zero >big; (ulimit -v 60000; "
                                "run tiny.bin -m tokenize -f big -j 1); a=$?; rm big; exit $a");
    survived("ulimit -v 60000; run tiny.bin -i abc -j 64 -q >/dev/null");
}

// ==== 9. Decoders: a full context, guesses, tools, ensembles, text on a terminal =================

// Part 1's own generate writes what the program writes.
static void test_generate(void) {
    enum { N = 60 };
    static const double ways_[][2] = {{0, 1}, {1, 0.9}, {0.7, 1}};
    Model m;
    Tokenizer t = {0};
    load_model(&m, "endless.bin");
    find_tokenizer(&t, NULL, &m);
    for (int i = 0; i < 3; i++) {
        Ids prompt = ids_of(&t, "abc", 3, NULL, true);
        int tokens[N], n = (int)prompt.n;
        memcpy(tokens, prompt.ids, prompt.n * sizeof(int));
        Sampler s = sampler_for(m.c.vocab_size, ways_[i][0], ways_[i][1], 5);
        Cache kv;
        cache_open(&kv, &m, N, 1);
        generate_tokens(&m, &kv, &s, tokens, n, N);
        cache_close(&kv);
        Buffer b = decoded(&t, tokens, N);
        put_text(&b, "\n");
        prints_bytes("part 1's generate and the program write the same text", &b,
                     text("run endless.bin -i abc -s 5 -q -n %d -t %g -p %g", N - n, ways_[i][0],
                    ways_[i][1]));
    }
    free_tokenizer(&t), free_model(&m);
}

// Continues `prompt` by `steps` tokens by hand: a fresh cache for every token that follows a cut.
// The model's greedy choice; a full context keeps `keep` tokens and the newest half. Returns text
// and receipt as the program prints them.
static Buffer by_hand(const Model *m, const Tokenizer *t, const char *prompt, int ctx, int keep_,
                      int steps) {
    Ids ids = ids_of(t, prompt, strlen(prompt), NULL, true);
    Buffer b = bytes_of(prompt, strlen(prompt));
    uint64_t receipt = 0;
    size_t vocab = (size_t)m->c.vocab_size;
    int *all = get((size_t)(ctx + 2), sizeof *all), n = (int)ids.n, done = 0;
    memcpy(all, ids.ids, ids.n * sizeof *all);
    Cache kv;
    cache_open(&kv, m, ctx, 1);
    for (int i = 0; i < steps; i++) {
        if (n > ctx) {
            int half = ctx / 2, stay = keep_ < ctx - half - 1 ? keep_ : ctx - half - 1;
            memmove(all + stay, all + n - half, (size_t)half * sizeof *all);
            n = stay + half, done = 0;
            cache_close(&kv), cache_open(&kv, m, ctx, 1);
        }
        const float *logits = prefill(m, &kv, 0, all, done, n);
        receipt = mix64(receipt + hash64(logits, vocab * 4));
        done = n, all[n++] = argmax(logits, (int)vocab);
        Text piece = decode(t, all[n - 2], all[n - 1]);
        put(&b, piece.s, piece.len);
    }
    cache_close(&kv);
    put_text(&b, text("\nreceipt: %016llx\n", (unsigned long long)receipt));
    return b;
}
static void test_full_contexts(void) {
    static const int contexts[] = {2, 3, 4, 5, 6, 7, 16, 33, 40, 64, 300};
    Model m;
    Tokenizer t = {0};
    load_model(&m, "endless.bin");
    find_tokenizer(&t, NULL, &m);
    for (size_t i = 0; i < sizeof contexts / sizeof *contexts; i++) {
        const char *prompt = contexts[i] < 5 ? "a" : "abc d";
        Ids ids = ids_of(&t, prompt, strlen(prompt), NULL, true);
        Buffer b = by_hand(&m, &t, prompt, contexts[i], ids.n < 4 ? (int)ids.n : 4, 400);
        prints_bytes("the text beyond a full context is that of fresh runs on the kept tokens", &b,
                     text("run endless.bin -i '%s' -t 0 -n 400 -c %d --receipt -q 2>&1", prompt,
                          contexts[i]));
    }
    survived("run endless.bin -i a -c 1 -n 9 -q");
    free_tokenizer(&t), free_model(&m);
}

static void test_guesses(void) {
    static const char *const commands[] = {
        "run endless.bin -i abc -n 300 -s 9 -d endless.bin",
        "run endless.bin -i 'abc abc abc abc' -n 300 -t 0 -d lookup"};
    for (int i = 0; i < 2; i++) {
        long long proposed = 0, accepted = -1;
        Ran r = ran(commands[i]);
        char *at = strstr((char *)r.err.p, "speculation: ");
        if (at) sscanf(at, "speculation: %lld tokens proposed, %lld", &proposed, &accepted);
        CHECK(proposed > (i ? 20 : 150) && (i ? accepted > 5 : accepted == proposed),
              "a model that drafts for itself guesses all right, lookup some: %s", r.err.p);
    }
}

#ifndef NO_TOOLS
static void test_questions(void) {
    static const struct { const char *text, *question, *before; } cases[] = {
        {"1234*4321=", "1234*4321", ""}, {"so 12 + 30 =", "12 + 30 ", " "}, {"1+1= ", "1+1", ""},
        {"x\n(1+2)*3=", "(1+2)*3", ""}, {"1) 3+4=", "3+4", ""}, {"2*-3=", "2*-3", ""},
        {"1.5*2=", "1.5*2", ""}, {"2^10%7=", "2^10%7", ""}, {"5=", "", ""}, {"x=", "", ""},
        {"=", "", ""}, {"", "", ""}, {"1+1", "", ""}, {"1+1=2", "", ""}, {"1+=", "", ""},
        {"(1+1=", "", ""}, {"1+1\n=", "", ""}, {"a1+1=", "", ""},
        {"1+1==", "", ""}, {"$3+4=", "3+4", ""}, {"1,234*2=", "", ""}, {"- 12*34=", "12*34", ""},
        {"sqrt(16)+2*3=", "", ""}, {"3x+2*5=", "", ""}, {"y + 2 * 3 =", "", ""},
        {"x-3*2=", "", ""}, {"http://a/page/3/2=", "", ""}, {"QUJD+12/34=", "", ""},
        {"10:30-11=", "", ""}, {"is: -3*2=", "-3*2", ""}, {"((((=", "", ""}, {"-1-1=", "-1-1", ""},
        {"say <tool_call>{\"a\": 1}</tool_call>", "{\"a\": 1}", "\n<tool_response>\n"},
        {"{}</tool_call>", "", ""}, {"<tool_call>{}</tool_call> ", "", ""},
        {"<tool_call>a<tool_call>b</tool_call>", "b", "\n<tool_response>\n"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *before, *after;
        Text q = tool_question((Text){cases[i].text, strlen(cases[i].text)}, &before, &after);
        CHECK(q.len == strlen(cases[i].question) && !memcmp(q.s, cases[i].question, q.len) &&
                  (!q.len || !strcmp(before, cases[i].before)),
              "\"%s\" asks \"%s\", not \"%.*s\"", cases[i].text, cases[i].question, (int)q.len,
              q.s);
    }
}

static void test_tools(void) {
    test_questions();
    Ran alone = ran("run endless.bin -i '12*34=' -n 9 -t 0 -q");
    static const char *const bad[] = {
        "exit 3", "true", "cat >/dev/null", "sleep 30", "/nonexistent", "yes", "kill -9 $$",
        "echo; exec >&-; sleep 30"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double began = seconds();
        Ran r = SH("e -T '%s' -i '12*34=' -n 9 -t 0 -q", bad[i]);
        CHECK(r.status == 1 && equal(&r.out, &alone.out) &&
                  strstr((char *)r.err.p, "run: the tool ") &&
                  seconds() - began < 9, "a bad tool is reported: %s: %s", bad[i], r.err.p);
    }
    survived("rm -f kv; e -T \"yes 'a b c' | head -c 3000\" -i '1+1=' -n 1 -q -S kv -c 300");
    survived("e -S kv -n 9 -q");
    Model m;
    Tokenizer t = {0};
    load_model(&m, "endless.bin");
    find_tokenizer(&t, NULL, &m);
    Options o = {.steps = 5, .threads = 1, .context = 500, .mode = "generate",
                 .tool = "echo '<s> 7'", .quiet = true};
    Output out = {.fd = -1};
    Machine w;
    Decoder d;
    machine_open(&w, &d, &o, &m, &t, &out);
    const Ids *ids = &d.c.ids;
    encode(&t, (Text){"1+1=", 4}, NULL, false, &d.c.ids);
    tool_use(&w, &d);
    for (size_t i = 0; i < ids->n; i++)
        CHECK(ids->ids[i] != t.h.bos, "special tokens are not recognised in what a tool prints");
    CHECK(ids->n > 3 && out.n == 6 && !memcmp(out.memory, "<s> 7\n", 6), "its answer is shown");
    o.mode = "chat";
    encode(&t, (Text){"1+1=", 4}, NULL, false, &d.c.ids);
    tool_use(&w, &d);
    CHECK(ids->ids[ids->n - 1] != 277, "in a chat the reply goes on behind a number");
    encode(&t, (Text){"<tool_call>{}</tool_call>", 25}, NULL, false, &d.c.ids);
    tool_use(&w, &d);
    CHECK(ids->ids[ids->n - 1] == 277, "in a chat the answer to a <tool_call> is a turn");
    machine_close(&w, &d);
    free(out.memory), free_tokenizer(&t), free_model(&m);
}
#endif

// The sum of -log2 p over the answer's tokens, divided by its bytes.
static double bits_per_byte(const char *model, const char *prompt, const Buffer *answer) {
    Model m;
    Tokenizer t = {0};
    load_model(&m, model);
    find_tokenizer(&t, NULL, &m);
    Ids head = ids_of(&t, prompt, strlen(prompt), NULL, true);
    Ids tail = ids_of(&t, (char *)answer->p, answer->n, NULL, false);
    Buffer both = bytes_of(head.ids, head.n * sizeof(int));
    put(&both, tail.ids, tail.n * sizeof(int));
    int *ids = (int *)(void *)both.p, n = (int)(head.n + tail.n), vocab = m.c.vocab_size;
    const float *logits = fresh_logits(&m, ids, n);
    double bits = 0;
    for (int k = (int)head.n - 1; k + 1 < n; k++) {
        const float *l = logits + k * vocab;
        double sum = 0;
        for (int v = 0; v < vocab; v++) sum += exp((double)l[v]);
        bits += (log(sum) - (double)l[ids[k + 1]]) / log(2);
    }
    free_tokenizer(&t), free_model(&m);
    return bits / (double)answer->n;
}
static void test_scores(void) {
    const char *models[] = {"endless.bin", "tiny.bin"};
    double means[2] = {0}, said = 0;
    Buffer cab = bytes_of("a bad cab", 9);
    Ran eval = ran("run tiny.bin -m eval -i 'a bad cab'");
    sscanf((char *)eval.out.p, "bits_per_byte: %lf", &said);
    CHECK(fabs(said - bits_per_byte("tiny.bin", "<s>", &cab)) < 1e-4, "eval: %s", eval.out.p);
    Ran r = ran("run endless.bin -i abc -n 20 -s 2 -e tiny.bin"), alone[2];
    const char *at = (char *)r.err.p;
    for (int i = 0; i < 2; i++) {
        alone[i] = SH("run %s -i abc -n 20 -s 2 -q", models[i]);
        Buffer answer = bytes_of(alone[i].out.p + 3, alone[i].out.n - 4);
        for (int j = 0; j < 2; j++) means[i] += bits_per_byte(models[j], "abc", &answer) / 2;
        at = strstr(at, "byte, mean ");
        CHECK(at && sscanf(at, "byte, mean %lf", &said) == 1 && fabs(said - means[i]) < 1e-3,
              "answer %d has %.4f bits per byte on average, not %.4f", i, means[i], said);
        at += at != NULL;
    }
    CHECK(r.status == 0 && equal(&r.out, &alone[means[1] < means[0]].out),
          "the answer with the lowest average is printed: %s", r.err.p);
#ifndef NO_ENSEMBLE
    Member judge;  // with room for 60 tokens
    Options o = {.input = {"a", 1}};
    member_open(&judge, "other.bin");
    char *x = memset(get(200, 1), 'x', 200);
    double all = member_score(&o, &judge, (Text){x, 200});
    double part = member_score(&o, &judge, (Text){x, 60});
    CHECK(fabs(all - part) < 1e-9, "a judge reads no more than it can: %g, %g", all, part);
    member_close(&judge);
#endif
}

// Writes a text in pieces of random lengths.
static void say_in_pieces(Output *out, const char *s, int most) {
    for (size_t n, left = strlen(s); left; s += n, left -= n) {
        n = 1 + (size_t)below(most);
        if (n > left) n = left;
        output_text(out, (Text){s, n});
    }
}

// What a text becomes on its way to stdout, in pieces of random lengths.
static void test_display(void) {
    static const char tags[] = "a<think>b <i>c</think>d</think><thi";
    static const struct { const char *text, *expected; bool terminal, think; const char *prompt; }
    cases[] = {
        {tags, "ad</think><thi\n", 0, 0, ""},
        {tags, "a<think>b <i>c</think>d</think><thi\n", 0, 1, ""},
        {tags, "a\033[2mb <i>c\033[0md</think><thi\n", 1, 0, ""},
        {"<<think>x", "<\n", 0, 0, ""}, {"x<think>", "x\033[2m\033[0m\n", 1, 0, ""},
        {"\033[31mred\033[0m\a\r\n\t\x7f", "^[[31mred^[[0m^G^M\n\t^?\n", 1, 0, ""},
        {"\033[31mred", "\033[31mred\n", 0, 0, ""}, {"\xc2" "A", "\xc2" "A\n", 1, 0, ""},
        {"\xc2\x9b" "1m \xc3\x9b \xe2\x82\xac", "\xc2\xa0" "1m \xc3\x9b \xe2\x82\xac\n", 1, 0, ""},
        {"\xc3\xa9 \xf0\x9f\x98\x80 \xf0\x9f", "\xc3\xa9 \xf0\x9f\x98\x80 \xf0\x9f\n", 0, 0, ""},
        {"thought</think>said", "said\n", 0, 0, "x</think><think>\n"}};
    int errors = dup(2), nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, 2);  // that some thoughts did not end
    for (size_t i = 0; i < 20 * sizeof cases / sizeof *cases; i++) {
        const char *s = cases[i / 20].text, *expected = cases[i / 20].expected;
        Options o = {.think = cases[i / 20].think};
        Tokenizer t = {.chat_flags[USER_AFTER] = THOUGHTS};
        Output out = {.fd = -1};
        out.terminal = cases[i / 20].terminal;
        output_begin(&out, &o, &t, (Text){cases[i / 20].prompt, strlen(cases[i / 20].prompt)});
        say_in_pieces(&out, s, i % 20 ? 9 : 1);
        output_end(&out);
        CHECK(out.n == strlen(expected) && !memcmp(out.memory, expected, out.n),
              "\"%s\" is shown as \"%s\", not \"%.*s\"", s, expected, (int)out.n, out.memory);
        free(out.memory);
    }
    dup2(errors, 2), close(errors), close(nowhere);
}

// A terminal's lines are broken between words, however the text comes in pieces.
static void test_wrapping(void) {
    static const struct { const char *text, *shown; } cases[] = {
        {"one two three four", "one two\nthree four\n"}, {"a b\n\nc d", "a b\n\nc d\n"},
        {"012345678901234567890 a bcdef g", "012345678901234567890 a bcdef\ng\n"},
        {"caf\xc3\xa9 x\xc3\xa9 d", "caf\xc3\xa9 x\xc3\xa9\nd\n"},
        {"\xe6\x97\xa5\xe6\x97\xa5 a \xe6\x97\xa5\xe6\x97\xa5\xe6\x97\xa5 12345 a",
         "\xe6\x97\xa5\xe6\x97\xa5 a \xe6\x97\xa5\xe6\x97\xa5\xe6\x97\xa5\n12345 a\n"}};
    for (size_t i = 0; i < 20 * sizeof cases / sizeof *cases; i++) {
        const char *s = cases[i / 20].text, *shown = cases[i / 20].shown;
        Output out = {.fd = -1, .terminal = true, .columns = 20};
        Tokenizer t = {0};
        output_begin(&out, &(Options){0}, &t, (Text){"", 0});
        say_in_pieces(&out, s, i % 20 ? 9 : 1);
        output_end(&out);
        CHECK(out.n == strlen(shown) && !memcmp(out.memory, shown, out.n),
              "\"%s\" is shown as \"%.*s\", not \"%s\"", s, (int)out.n, out.memory, shown);
        free(out.memory);
    }
}

// Text that streams in pieces of random lengths ends before the first of some texts, and nothing of
// that is ever sent. (A stop begins in another one, or over again, or in a thought, which is not
// shown.)
static void test_stops(void) {
    static const struct { const char *text, *stops[3], *expected; } cases[] = {
        {"one two three", {"two"}, "one "}, {"one two three", {"three", "two "}, "one "},
        {"aaab", {"aab"}, "a"}, {"abcabcabd!", {"abcabd"}, "abc"}, {"abcd", {"bcde", "cd"}, "ab"},
        {"no stop, but a par", {"part"}, "no stop, but a par"}, {"x", {"x"}, ""},
        {"\xe2\x82\xac\xe2\x82\xacuro", {"\xacu"}, "\xe2\x82\xac\xe2\x82"},
        {"a<think>bc</think>cd\nc", {"b"}, "a"}, {"a<think>b</think>c\n\nd", {"\n\n"}, "ac"}};
    int errors = dup(2), nowhere = open("/dev/null", O_WRONLY);
    dup2(nowhere, 2);  // where it is said that a thought did not end
    for (size_t i = 0; i < 50 * sizeof cases / sizeof *cases; i++) {
        const char *s = cases[i / 50].text, *expected = cases[i / 50].expected;
        Options o = {0};
        while (o.stops.n < 3 && cases[i / 50].stops[o.stops.n])
            o.stops.of[o.stops.n] = cases[i / 50].stops[o.stops.n], o.stops.n++;
        FILE *file = tmpfile();
        Output out = {.fd = i % 2 ? fileno(file) : -1};
        char sent[100];
        size_t len = strlen(s), whole = strlen(expected);
        Tokenizer t = {.chat_flags[USER_AFTER] = THOUGHTS};
        output_begin(&out, &o, &t, (Text){"", 0});
        for (size_t at = 0, n; at < len; at += n) {
            n = 1 + (size_t)below(i % 10 ? 5 : 1);
            if (n > len - at) n = len - at;
            output_text(&out, (Text){s + at, n});
            ssize_t got = pread(fileno(file), sent, sizeof sent, 0);
            CHECK(got >= 0 && (size_t)got <= whole && !memcmp(sent, expected, (size_t)got),
                  "\"%.*s\" was sent of \"%s\"", (int)got, sent, s);
        }
        output_end(&out);
        if (i % 2) out.n = (size_t)pread(out.fd, sent, sizeof sent, 0);
        else memcpy(sent, out.memory, out.n);
        CHECK(out.n == whole + 1 && !memcmp(sent, expected, whole) && sent[whole] == '\n',
              "\"%s\" is \"%.*s\", not \"%s\"", s, (int)out.n, sent, expected);
        fclose(file);
        free(out.memory);
    }
    dup2(errors, 2), close(errors), close(nowhere);
}

#ifndef NO_EACH
// A job that is killed or interrupted at a random moment has written whole lines, and goes on.
static void test_each_goes_on(void) {
    Ran whole = SH("seq 1 300 >many; run endless.bin -q -n 9 -s 3 -i 'ab {}' --each many");
    int cut = 0;
    for (int round = 0; round < 12; round++) {
        int number = round % 2 ? SIGINT : SIGKILL;
        signalled("run endless.bin -q -n 9 -s 3 -i 'ab {}' --each many", -1, number, 60000, false);
        Buffer part = slurp("stdout");
        int n = lines(&part);
        Ran rest = SH("run endless.bin -q -n 9 -s 3 -i 'ab {}' --each many --skip %d", n);
        put(&part, rest.out.p, rest.out.n);
        CHECK(equal(&part, &whole.out), "after signal %d and %d lines a job goes on", number, n);
        cut += n < 300;
    }
    CHECK(cut > 3 && lines(&whole.out) == 300, "jobs were cut: %d", cut);
}

// The answer to each line is that of a run of its own with the seed that a sample would have, from
// its first character that is no white space to the end of its line, however many run at once.
static void test_each(void) {
    static const char *const texts[] = {"ab", "", "cad", "a bad cab", "d", "abc", "abd"};
    static const char *const ways_[] = {"-t 0", "-t 0.8", "-t 2 --stop ab", "-t 2 --top-k 3",
                                       "-m chat -t 2", "-m chat -y be -t 0.8 --think"};
    static const int at_once[] = {1, 3, 16};
    for (int way = 0; way < 6 && !cut_out(ways_[way]); way++) {
        Buffer own = {0}, file = {0}, quoted = bytes_of("", 0);
        for (uint64_t i = 0; i < 7; i++) {
            put_text(&file, text("%s\n", texts[i]));
            Ran r = SH("run endless.bin -q -n 20 %s -s %llu -i 'ab %s'", ways_[way],
                       (unsigned long long)(5 + i * 0x9E3779B97F4A7C15u), texts[i]);
            const char *answer = (char *)r.out.p + (way < 4 ? 3 + strlen(texts[i]) : 0);
            const char *shown = answer + strspn(answer, " \t\r\n");
            size_t n = (size_t)((char *)r.out.p + r.out.n - 1 - answer);
            const char *end = memchr(shown, '\n', (size_t)(answer + n - shown) + 1);
            put(&own, shown, shown < end ? (size_t)(end - shown) : 0);
            put_text(&own, "\n");
            Output json = {.fd = -1};
            output_json(&json, (Text){answer, n});
            put(&quoted, json.memory, json.n), put_text(&quoted, "\n");
            free(json.memory);
        }
        keep("lines", &file);
        for (int k = 0; k < 3; k++) {
            const char *each_ = text("run endless.bin -q -n 20 %s -s 5 --at-once %d -i 'ab {}' "
                                     "--each", ways_[way], at_once[k]);
            prints_bytes("lines", &own, text("%s lines", each_));
            prints_bytes("lines of stdin", &own, text("%s - <lines", each_));
            prints_bytes("a job goes on", &own,
                         text("%s lines | head -n 3 >a; %s lines --skip 3 >b; cat a b", each_,
                              each_));
            prints_bytes("quoted answers", &quoted, text("%s lines --quote", each_));
        }
    }
    Ran r = SH("run endless.bin -q -c 8 -n 2 -t 0 --each lines >a; s=$?; wc -l <a; exit $s");
    CHECK(r.status == 1 && atoi((char *)r.out.p) == 7 && one_line(&r) &&
              strstr((char *)r.err.p, "line 4 has 9 tokens"),
          "a line that is too long has no answer: %s%s", r.out.p, r.err.p);
    double nats, bits;
    int n;
    Buffer cab = bytes_of("a bad cab", 9);
    refused(2, "is not measured", "run tiny.bin -m eval -i 'a {} b' --each lines");
    r = SH("run tiny.bin -q -m eval -i 'ab{}' --each lines | sed -n 4p");
    CHECK(sscanf((char *)r.out.p, "%lf\t%d\t%lf", &nats, &n, &bits) == 3 && n == 9 &&
              fabs(bits - bits_per_byte("tiny.bin", "ab", &cab)) < 1e-4 &&
              fabs(-nats / 9 / log(2) - bits) < 1e-4, "eval of each line: %s", r.out.p);
    r = SH("run endless.bin -q -n 2 -t 0 --skip 99 --each lines 2>&1");
    CHECK(r.status == 0 && !r.out.n, "no line is left: %s", r.out.p);
    r = SH("run tiny.bin -q -m eval -c 9 -i 'ab{}' --each lines >a; s=$?; wc -l <a; exit $s");
    CHECK(r.status == 1 && atoi((char *)r.out.p) == 7 && one_line(&r), "eval of a line that is "
          "too long: %d, %s", r.status, r.err.p);
    refused(2, "the prompt has no {}", "run endless.bin -i ab --each lines");
    refused(2, "--each cannot be used", "run endless.bin -k 2 --each lines");
    refused(2, "need --each", "run endless.bin -i a --skip 3");
    refused(2, "both the prompt and the lines", "run endless.bin -f - --each -");
    refused(1, "cannot open none", "run endless.bin --each none");
    test_each_goes_on();
}
#endif

// --logprobs: a line for each token; the ids are those of the text, the sum is its likelihood, and
// the first of the likeliest is the greedy choice.
static void test_logprobs(void) {
    static const char *const runs[] = {
        "run tiny.bin -q -m eval -i 'a bad cab' --logprobs 2",
        "run tiny.bin -q -i 'ab' -n 9 -t 0 --logprobs 1",
        "run endless.bin -q -i 'ab' -n 9 -s 3 --logprobs 0 -d lookup"};
    Model m;
    Tokenizer t = {0};
    load_model(&m, "tiny.bin");
    find_tokenizer(&t, NULL, &m);
    Buffer cab = bytes_of("a bad cab", 9);
    for (int i = 0; i < 3; i++) {
        Ran r = ran(runs[i]);
        int ids[16] = {0}, n = 0, top, tops = 0;
        double sum = 0, logprob;
        for (char *at = (char *)r.out.p; n < 16 && at && *at; n++) {
            char *id = strstr(at, "\"id\": "), *first = strstr(at, "\"top\": [{");
            CHECK(at[0] == '{' && id && sscanf(id, "\"id\": %d, \"logprob\": %lf", &ids[n],
                                               &logprob) == 2, "a line of JSON: %s", at);
            at = strchr(at, '\n');
            if (first && first < at) first = strstr(first, "\"id\": ");
            tops += first && first < at && sscanf(first, "\"id\": %d", &top) == 1 && top == ids[n];
            sum += logprob;
            at += at != NULL;
        }
        CHECK(n == 9 && lines(&r.out) == 9 && r.status == 0, "%d lines of %s", n, runs[i]);
        if (i == 0)
            CHECK(fabs(-sum / 9 / log(2) - bits_per_byte("tiny.bin", "<s>", &cab)) < 1e-4 &&
                      count(&r.out, "logprob") == 27, "log-probabilities add up: %s", r.out.p);
        if (i == 1) CHECK(tops == 9, "%d of 9 tokens are the likeliest", tops);
        if (i == 0) continue;
        Buffer b = decoded(&t, ids, 9);
        Ran plain = SH("run %s.bin -q -i 'ab' -n 9 %s", i == 1 ? "tiny" : "endless",
                       i == 1 ? "-t 0" : "-s 3");
        CHECK(plain.out.n == b.n + 3 && !memcmp(plain.out.p + 2, b.p, b.n), "%s is not %s", b.p,
              plain.out.p);
    }
    free_tokenizer(&t), free_model(&m);
    refused(2, "--logprobs cannot be used", "run endless.bin -k 2 --logprobs 2");
}

#ifndef NO_CHAT
// Two turns in chat formats: the first one is written anew once it is answered.
static const struct {
    const char *what, *system, *user, *reply, *next, *text;
    int flags[N_CHAT];
} chats[] = {
    {"texts stand between the pieces", NULL, " a ", " b ", "c", "DU a A b ELcA", {0}},
    {"an answer is written behind REPLY_BEFORE", NULL, "a", "b", "c", "DUaRbELcA", {0}},
    {"blanks are trimmed as in Python", NULL, "\xe3\x80\x80" "a a\x1f", "\n b\xc2\xa0\n", " c",
     "DUa aRbEL cA", {[USER_BEFORE] = 3, [REPLY_BEFORE] = 3}},
    {"a text of blanks only", NULL, " \n", "\n\n b ", "\n", "DUR bELA",
     {[USER_BEFORE] = 2, [REPLY_BEFORE] = 6, [LATER_BEFORE] = 1}},
    {"a system text", "s", "a", "b", "c", "SsZVaRbELcA", {[SYSTEM_BEFORE] = HAS_SYSTEM}},
    {"an empty one", "", "a", "b", "c", "SZVaRbELcA", {[SYSTEM_BEFORE] = HAS_SYSTEM}},
    {"an empty one that is none", " ", "a", "b", "c", "DUaRbELcA",
     {[SYSTEM_BEFORE] = HAS_SYSTEM | EMPTY_IS_NONE | TRIM_LEFT}},
    {"one without a place", "s", "a", "b", "c", "DUaRbELcA", {0}},
    {"one in the last turn", "s", "a", "b", "c", "DUaRbELsZVcA",
     {[SYSTEM_BEFORE] = HAS_SYSTEM | SYSTEM_LAST}},
    {"thoughts of earlier answers are left out", NULL, "a</think>", "x</think>y</think>\n b ", "c",
     "DUa</think>R b ELcA", {[REPLY_BEFORE] = CUT_THOUGHT | TRIM_NEWLINES << FROM_THOUGHT}},
    {"but are text in other formats", NULL, "a", "<think>x</think>b", "c",
     "DUaR<think>x</think>bELcA", {0}},
    {"the date, and a percent sign", NULL, "%d", "b", "c", "01 January 1970U%dRbELcA",
     {[DEFAULT_SYSTEM] = DATE}}};

static void test_chats(void) {
    Model m;
    load_model(&m, "endless.bin");
    setenv("SOURCE_DATE_EPOCH", "0", 1);
    for (size_t i = 0; i < sizeof chats / sizeof *chats; i++) {
        Vocabulary *v = tiny_vocabulary();
        bool dated = chats[i].flags[DEFAULT_SYSTEM], same = i == 0;
        v->chat.n = 0, v->n_chat = 0;
        chat_format(v, (const char *[]){dated ? "%d %B %Y" : "D", "S", "Z", "U", "V", "L", "A",
                                        same ? "A" : "R", "E"}, chats[i].flags);
        Tokenizer t = open_tokenizer(v, "chats.tok");
        Options o = {.threads = 1, .temperature = 0, .repeat_penalty = 1, .context = 300,
                     .mode = "chat", .quiet = true};
        Text system = {chats[i].system, chats[i].system ? strlen(chats[i].system) : 0};
        Output out = {.fd = -1};
        Machine w;
        Decoder d;
        machine_open(&w, &d, &o, &m, &t, &out);
        Prompt p[3] = {{0}};
        Text user = {chats[i].user, strlen(chats[i].user)};
        Text next = {chats[i].next, strlen(chats[i].next)};
        Text reply = {chats[i].reply, strlen(chats[i].reply)};
        Ids *ids = &d.c.ids;
        prompt_turn(&p[0], &t, -1, system, user, USER_AFTER);
        prompt_encode(&p[0], &t, true, ids);
        int answer = (int)ids->n;
        encode(&t, reply, NULL, false, ids);
        decoder_settle(&w, &d, 0);
        int done = d.c.done;
        prompt_turn(&p[1], &t, -1, system, user, REPLY_BEFORE);
        chat_settle(&w, &d, &p[0], &p[1], 0, answer);
        prompt_turn(&p[2], &t, ids->ids[ids->n - 1], system, next, USER_AFTER);
        ids->n--;
        prompt_encode(&p[2], &t, false, ids);
        Output got = decoder_text(&w, &d, 0);
        const char *text = chats[i].text;
        CHECK(got.n == strlen(text) && !memcmp(got.memory, text, got.n), "%s: %.*s, not %s",
              chats[i].what, (int)got.n, got.memory, text);
        CHECK(!same || d.c.done == done, "what did not change is not computed again");
        for (int j = 0; j < 3; j++) prompt_free(&p[j]);
        free(got.memory), machine_close(&w, &d), free_tokenizer(&t);
    }
    unsetenv("SOURCE_DATE_EPOCH");
    free_model(&m);
}
#endif

// What an interruption left out is not computed upon: pages before it are missing.
static void test_interrupted(void) {
    enum { N = 2 * PAGE_POSITIONS + 9 };
    Model m;
    Cache kv;
    load_model(&m, "endless.bin");
    cache_open(&kv, &m, N, 1);
    int *ids = random_ids(N, m.c.vocab_size);
    Given g = {.m = &m, .kv = &kv, .ids = ids, .end = N - 1};
    interrupted = SIGINT;
    CHECK(!given_logits(&g, N - 2) && given_likelihood(&g, N - 3) == 0 &&
              reward_of_ids(&m, ids, N) == (double)-INFINITY,
          "an interruption in what comes before ends the measure");
    interrupted = 0;
    CHECK(given_logits(&g, N - 2) && given_likelihood(&g, N - 2) > 0, "without one it goes on");
    cache_close(&kv), free_model(&m);
}

// A reward model whose row is one of a classifier: its reward is that token's logit. With --reward
// the sample with the highest one is printed.
static void test_reward(void) {
    enum { ROW = 97 };
    Made made = tiny_model(LLAMA, F32);
    const Tensor *rows = made.classifier.values ? &made.classifier : &made.embedding;
    made.score = vector(made.s.dim, 0, 0);
    for (int i = 0; i < made.s.dim; i++)
        made.score.values[i] = rows->values[(size_t)(ROW * made.s.dim + i)];
    save_model("judge", &made, tiny_vocabulary());
    Model m;
    load_model(&m, "judge.bin");
    int ids[] = {5, 97, 98, 3, 60}, best = 0;
    float *logits = fresh_logits(&m, ids, 5);
    double reward = reward_of_ids(&m, ids, 5), most = -INFINITY;
    float logit = row_of(logits, 4, m.c.vocab_size)[ROW];
    CHECK(fabs(reward - (double)logit) < 1e-4, "the reward is %g, not %g", reward, (double)logit);
    free_model(&m);
    Ran r = SH("run endless.bin -i abc -n 9 -s 2 -k 4 -b --reward judge.bin 2>a; "
               "grep reward a >&2");
    const char *at = (char *)r.err.p;
    for (int i = 0; i < 4 && at; i++, at = strchr(at, '\n') + 1)
        if (sscanf(at, "%*[^,], 9 tokens, reward %lf", &reward) == 1 && reward > most)
            best = i, most = reward;
    Ran alone = SH("run endless.bin -i abc -n 9 -q -s %llu",
                   (unsigned long long)(2 + (uint64_t)best * 0x9E3779B97F4A7C15u));
    CHECK(r.status == 0 && lines(&r.err) == 4 && equal(&r.out, &alone.out),
          "the sample with the highest reward is printed: %s", r.err.p);
    refused(2, "it needs -k or -e", "run endless.bin -i abc --reward judge.bin");
    refused(1, "is no reward model", "run endless.bin -i abc -k 2 -b --reward tiny.bin");
}

static void test_decoders(void) {
    if (no_program()) return;
    test_interrupted();
    test_reward();
#ifndef NO_CHAT
    test_chats();
#endif
    test_logprobs();
#ifndef NO_EACH
    test_each();
#endif
    test_display();
    test_wrapping();
    test_stops();
    test_generate();
    test_full_contexts();
    test_guesses();
#ifndef NO_TOOLS
    test_tools();
#endif
#ifndef NO_ENSEMBLE
    test_scores();
#endif
}

#ifndef NO_SCHEMA
// ==== Schemas ===================================================================================
// How many bytes of a document fit a schema, and -1 if all do.
static int fitting(const char *schema, const char *document) {
    Schema *s = schema_open(&(Options){.schema = schema});
    SchemaText x = schema_begin(s);
    int n = 0, len = (int)strlen(document);
    while (n < len && schema_step(&x, (uint8_t)document[n])) n++;
    bool whole = schema_end(&x) && n == len;
    schema_close(s);
    return whole ? -1 : n;
}

// Documents that fit a schema, and others, with the byte where they go wrong.
static const struct { const char *schema, *document; int wrong; } schema_cases[] = {
    {"{}", "[1, -0.5e+3, true, null, {\"a\": {}}, \"\\u00e9\\ud83d\\ude00\"]", -1},
    {"{}", "\"\\u006@\"", 6}, {"{\"enum\": [\"\\ud83d\\ude00\"]}", "\"\xf0\x9f\x98\x80\"", -1},
    {"{}", "[1,2]", 3}, {"{}", "01", 1}, {"{}", "\"\\ud83d\"", 7}, {"{}", "\"\xc0\xaf\"", 1},
    {"{}", "{\"a\": 1, \"\\u0061\": 2}", 16}, {"{}", "1.", 2}, {"{}", "[1, ]", 4},
    {"{\"type\": \"integer\"}", "12.0", -1}, {"{\"type\": \"integer\"}", "1.5", 2},
    {"{\"type\": \"integer\"}", "1e+16", 1}, {"{\"type\": \"integer\"}", "true", 0},
    {"{\"minimum\": 3, \"maximum\": 12}", "12.0", -1},
    {"{\"minimum\": 3, \"maximum\": 12}", "12.51", 3},
    {"{\"minimum\": 3, \"maximum\": 12}", "2", 0},
    {"{\"minimum\": -2, \"exclusiveMaximum\": 0}", "-0.5", -1},
    {"{\"minimum\": -2, \"exclusiveMaximum\": 0}", "-1e-07", -1},
    {"{\"minimum\": -2, \"exclusiveMaximum\": 0}", "0", 0},
    {"{\"minimum\": 9007199254740993}", "9007199254740992", 16},
    {"{\"enum\": [\"caf\xc3\xa9\", 1, [2], {\"a\": null}]}", "\"caf\\u00e9\"", -1},
    {"{\"enum\": [\"caf\xc3\xa9\", 1, [2], {\"a\": null}]}", "1.0", -1},
    {"{\"enum\": [\"caf\xc3\xa9\", 1, [2], {\"a\": null}]}", "{\"a\": null}", -1},
    {"{\"enum\": [\"caf\xc3\xa9\", 1, [2], {\"a\": null}]}", "[3]", 1},
    {"{\"minLength\": 2, \"maxLength\": 3}", "\"\xc3\xa9\\ud83d\\ude00a\"", -1},
    {"{\"minLength\": 2, \"maxLength\": 3}", "\"a\"", 2},
    {"{\"minLength\": 2, \"maxLength\": 3}", "\"abcd\"", 4},
    {"{\"minLength\": 2, \"maxLength\": 6, \"pattern\": \"^[a-f]{1,4}$\"}", "\"ab\"", -1},
    {"{\"minLength\": 2, \"maxLength\": 6, \"pattern\": \"^[a-f]{1,4}$\"}", "\"abz\"", 3},
    {"{\"minLength\": 2, \"maxLength\": 6, \"pattern\": \"^[a-f]{1,4}$\"}", "\"a\"", 2},
    {"{\"minLength\": 2, \"maxLength\": 6, \"pattern\": \"^[a-f]{1,4}$\"}", "\"abcde\"", 5},
    {"{\"pattern\": \"^(a|bc)+$|x\"}", "\"abca\"", -1},
    {"{\"pattern\": \"^(a|bc)+$|x\"}", "\"ab\"", 3},
    {"{\"pattern\": \"^(a|bc)+$|x\"}", "\"zxz\"", -1},
    {"{\"pattern\": \"^[^a-c]{2,}\\\\d$\"}", "\"xy7\"", -1},
    {"{\"format\": \"date\"}", "\"2024-02-29\"", -1},
    {"{\"format\": \"date\"}", "\"2023-02-29\"", 10},
    {"{\"format\": \"uri\"}", "\"a b\"", 2},
    {"{\"properties\": {\"a\": {\"type\": \"null\"}}, \"required\": [\"a\", \"b\"]}",
     "{\"b\": 1, \"a\": null}", -1},
    {"{\"properties\": {\"a\": {\"type\": \"null\"}}, \"required\": [\"a\", \"b\"]}",
     "{\"a\": null}", 10},
    {"{\"maxProperties\": 1}", "{\"c\": 1, ", 7},
    {"{\"properties\": {\"a\": {}}, \"additionalProperties\": false}", "{\"\\u0061\": 1}", -1},
    {"{\"properties\": {\"a\": {}}, \"additionalProperties\": false}", "{\"a\": 1, ", 7},
    {"{\"patternProperties\": {\"^a\": {\"type\": \"null\"}, \"b$\": {\"enum\": [null, 1]}}}",
     "{\"b\": 1, \"ab\": null, \"c\": 2}", -1},
    {"{\"patternProperties\": {\"^a\": {\"type\": \"null\"}, \"b$\": {\"enum\": [null, 1]}}}",
     "{\"ab\": 1}", 7},
    {"{\"prefixItems\": [{\"type\": \"null\"}], \"items\": {\"type\": \"boolean\"},"
     " \"minItems\": 2}",
     "[null, true, false]", -1},
    {"{\"prefixItems\": [{\"type\": \"null\"}], \"items\": {\"type\": \"boolean\"},"
     " \"minItems\": 2}",
     "[null]", 5},
    {"{\"$defs\": {\"t\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/t\"}}},"
     " \"$ref\": \"#/$defs/t\", \"maxItems\": 1}", "[[[], []]]", -1},
    {"{\"$defs\": {\"t\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/t\"}}},"
     " \"$ref\": \"#/$defs/t\", \"maxItems\": 1}", "[[], []]", 3},
    {"{\"$schema\": \"http://json-schema.org/draft-07/schema#\", \"properties\": {\"a\": "
     "{\"$ref\": \"#/definitions/n\", \"maximum\": 1}}, \"definitions\": {\"n\": {}}}",
     "{\"a\": 5}", -1},
    {"{\"$schema\": \"http://json-schema.org/draft-04/schema#\", \"minimum\": 1, "
     "\"exclusiveMinimum\": true}", "1.0", 3},
    {"{\"anyOf\": [{\"required\": [\"a\"]}, {\"required\": [\"b\"]}], \"type\": \"object\"}",
     "{\"c\": 1}", 7},
    {"{\"oneOf\": [{\"type\": \"integer\"}, {\"type\": \"string\"}]}", "2", -1},
    {"{\"minimum\": -0.25, \"exclusiveMaximum\": 1.5}", "1.49", -1},
    {"{\"minimum\": -0.25, \"exclusiveMaximum\": 1.5}", "1.50", 4},
    {"{\"minimum\": -0.25, \"exclusiveMaximum\": 1.5}", "-0.3", 3},
    {"{\"minimum\": -0.25, \"exclusiveMaximum\": 1.5}", "-0.250", -1},
    {"{\"format\": \"ipv4\"}", "\"1.20.255.0\"", -1},
    {"{\"format\": \"ipv4\"}", "\"1.20.256.0\"", 8},
    {"{\"format\": \"ipv6\"}", "\"fe80::1:2\"", -1},
    {"{\"format\": \"ipv6\"}", "\"::ffff:1.2.3.4\"", -1},
    {"{\"format\": \"ipv6\"}", "\"1:2:3:4:5:6:7\"", 14},
    {"{\"required\": [\"a\", \"b\"], \"maxProperties\": 2}", "{\"a\": 1, \"c\"", 10},
    {"{\"allOf\": [{\"minimum\": 2}, {\"maximum\": 3}], \"type\": \"integer\"}", "4", 0},
    {"{\"maxItems\": 0}", "[]", -1}, {"{\"maxItems\": 0}", "[1]", 1},
    {"{\"maximum\": 100000000000000000000}", "1e+300", 2},
    {"{\"properties\": {\"a\": {\"$ref\": \"#\"}}, \"minProperties\": 1}",
     "{\"a\": {\"b\": 1}}", -1},
};
static void test_documents(void) {
    for (size_t i = 0; i < sizeof schema_cases / sizeof *schema_cases; i++) {
        const char *schema = schema_cases[i].schema, *document = schema_cases[i].document;
        int wrong = fitting(schema, document);
        CHECK(wrong == schema_cases[i].wrong, "%s with %s: %d, not %d", document, schema, wrong,
              schema_cases[i].wrong);
    }
}

// What is not understood, and what nothing can meet, is refused before the model runs.
static void test_refused_schemas(void) {
    static const struct { const char *schema, *says; } cases[] = {
        {"{\"items\": {\"uniqueItems\": true}}", "uniqueItems is a keyword that"},
        {"{\"pattern\": \"(?=a)\"}", "byte 12: pattern is not a pattern"},
        {"{\"$ref\": \"other.json\"}", "$ref leads out of"},
        {"{\"$ref\": \"#/$defs/a\"}", "$ref leads nowhere"},
        {"{\"allOf\": [{\"$ref\": \"#\"}]}", "refers to itself"},
        {"{\"not\": {}}", "not is a keyword"}, {"{\"propertyNames\": false}", "a keyword"},
        {"{\"maximum\": 1e5}", "is not a number of few digits"},
        {"{\"oneOf\": [{\"type\": \"array\"}, {\"maxItems\": 1}]}", "alternatives that overlap"},
        {"{\"required\": [\"a\", \"b\"], \"maxProperties\": 1, \"type\": \"object\"}",
         "cannot be met"},
        {"{\"properties\": {\"\\u001b[31m\": 5}}", "?[31m is malformed"},
        {"{\"type\": \"int\"}", "type is malformed"}, {"{\"minLength\": \"1\"}", "is malformed"},
        {"{\"pattern\": \"a\\u0000b\"}", "has a zero in a string"},
        {"{\"pattern\": \"^x{,5}$\"}", "is not a pattern"},
        {"{\"minProperties\": 1, \"additionalProperties\": false, \"type\": \"object\"}",
         "cannot be met"},
        {"{\"type\": \"string\"", "is no JSON"}, {"{\"type\": \"string\"} x", "something follows"},
        {"{\"enum\": [1], \"type\": \"string\"}", "cannot be met"},
        {"{\"required\": [\"a\"], \"properties\": {\"a\": {\"$ref\": \"#\"}},"
         " \"type\": \"object\"}",
         "cannot be met"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refused(2, cases[i].says, text("run endless.bin --schema '%s'", cases[i].schema));
    refused(2, "cannot be used together", "run endless.bin --json --schema '{}'");
    refused(2, "nor with -e, -T", "run endless.bin --json --stop a");
    refused(1, "cannot open none", "run endless.bin --schema none");
}

// Whatever a model writes, with whatever seed, fits; what does not end is said.
static void test_written(void) {
    static const char *const schemas[] = {
        "{\"enum\": [\"abc\", \"abd\", null]}",
        "{\"type\": \"string\", \"pattern\": \"^[0-9]{2}[#-&]?$\"}",
        "{\"type\": \"string\", \"pattern\": \"^[a-f]{3}\\u00e9?$\"}",
        "{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"boolean\"},"
        " \"cab\": {\"maxItems\": 2, \"type\": \"array\", \"items\": {\"type\": \"null\"}}},"
        " \"required\": [\"cab\"],"
        " \"additionalProperties\": false}"};
    for (int i = 0; i < 4; i++)
        for (int seed = 1; seed <= 10; seed++) {
            Buffer schema = bytes_of(schemas[i], strlen(schemas[i]));
            keep("schema", &schema);
            Ran r = SH("run endless.bin -q -i ab -t 1.5 -s %d -n 200 --schema schema%s", seed,
                       seed % 3 == 1 ? " -d lookup" : seed % 3 == 2 ? " -k 3 -b" : "");
            char *document = (char *)r.out.p;
            if (r.out.n) document[r.out.n - 1] = 0;
            CHECK(r.status == 0 && fitting(schemas[i], document) == -1,
                  "what fits %s is written: %d, %s", schemas[i], r.status, document);
        }
    prints("what can be written plainly has no escapes", "\"abc\"\n",
           "run endless.bin -q -i ab -t 0 -n 9 --schema '{\"enum\": [\"abc\"]}'");
    same("guesses are checked", "run endless.bin -q -i ab -s 3 -n 200 --schema schema",
         "run endless.bin -q -i ab -s 3 -n 200 --schema schema -d lookup");
    const char *long_ = "{\"type\": \"string\", \"minLength\": 50}";
    Ran r = SH("run endless.bin -q -i ab -n 3 --schema '%s'", long_);
    CHECK(r.status == 1 && r.out.n > 1 && one_line(&r), "what -n cuts has status 1: %d, %s",
          r.status, r.err.p);
    r = SH("printf '{\"a\": [1]}\\n' >doc; run tiny.bin -q -m eval --json -f doc");
    CHECK(r.status == 0, "eval takes what fits: %s", r.err.p);
    refused(1, "doc does not fit --json: byte 2 goes wrong",
            "printf '[1 ]' >doc; run tiny.bin -q -m eval --json -f doc");
    refused(1, "byte 2 is missing", "printf '[1' >doc; run tiny.bin -q -m eval --json -f doc");
}

// A mask forbids the tokens of which some byte cannot come, along texts that are drawn from it.
static void test_masks(void) {
    static const char *const schemas[] = {
        "{}", "{\"type\": \"string\", \"minLength\": 30, \"maxLength\": 60}",
        "{\"type\": \"string\", \"pattern\": \"^a[a-f,]{2,40}\u00e9{0,20}.{12}$\"}",
        "{\"type\": \"string\", \"pattern\": \"^[^b]*$\", \"maxLength\": 40}",
        "{\"type\": \"string\", \"pattern\": \"^[a\u00e9][ab,]+$\", \"minLength\": 9}",
        ("{\"anyOf\": [{\"items\": [{\"enum\": [\"aaab\"]}, false], \"minItems\": 2, "
        "\"type\": \"array\"}, {\"items\": {\"pattern\": \"^b\"}, \"type\": \"array\"}]}"),
        "{\"additionalProperties\": {\"enum\": [\"aaaaaaaaab\", [1, 23], \"ab,ac\"]}}"};
    static const char *const texts[] = {"ab", "aaaa", "aaaaaaaa", "a\"", "\",", "\": ", ", \"",
        "\xc3\xa9", "a\xc3", "\xa9\xc3", "\\u", "\\n\\", "00e", "[1", "1, 2", "}", "{\"", "ab",
        "\n", "aaaaaaaaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbbbbbbb\", "};
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    all_bytes(v);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        token(v, texts[i], strlen(texts[i]), 0, NORMAL);
    put32(&v->stops, token(v, "<stop>", 6, 0, CONTROL)), v->n_stops++;
    Tokenizer t = open_tokenizer(v, "mask.tok");
    for (size_t i = 0; i < sizeof schemas / sizeof *schemas; i++) {
        Schema *s = schema_open(&(Options){.schema = schemas[i]});
        int wrong = 0, masks = 0;
        for (int round = 0; round < 40; round++) {
            SchemaText x = schema_begin(s);
            for (bool ends = false; !ends && masks < 50 * (round + 1); masks++) {
                const uint8_t *mask = schema_mask(&x, &t);
                int drawn = -1, seen = 0;
                for (int id = 0; id < v->n; id++) {
                    Text text = decode(&t, -1, id);
                    SchemaText y = x;
                    size_t n = 0;
                    while (n < text.len && schema_step(&y, (uint8_t)text.s[n])) n++;
                    bool stop = is_stop(&t, id), fits = text.len && n == text.len;
                    wrong += mask[id] != !(stop ? schema_complete(&x) : fits);
                    if (!mask[id] && !below(++seen)) drawn = id;
                }
                ends = is_stop(&t, drawn) || schema_take(&x, decode(&t, -1, drawn));
            }
            schema_end(&x);
        }
        CHECK(!wrong && masks > 100, "masks of %s: %d tokens of %d masks are wrong", schemas[i],
              wrong, masks);
        schema_close(s);
    }
    Schema *s = schema_open(&(Options){.json = true});
    SchemaText x = schema_begin(s);
    schema_take(&x, (Text){"{\"ab", 4});
    schema_mask(&x, &t);
    int names = 0;
    for (int i = 0; i < s->n_nodes; i++) names += s->nodes[i].op == PAST;
    CHECK(names > 2 && names < 60, "names are kept where they may end, not those of all tokens: %d",
          names);
    schema_close(s);
    free_tokenizer(&t);
}

static void test_schema(void) {
    test_documents();
    test_masks();
    if (no_program()) return;
    test_refused_schemas();
    test_written();
    ran("(echo '{\"enum\": [0'; seq -f ', \"x%g\"' 7000; echo ']}') >many.json; "
        "run endless.bin -i a --schema many.json -t 0 -q");  // in time
}
#else
static void test_schema(void) {}
#endif

// ==== 10. Sessions ===============================================================================
#ifndef NO_SESSIONS

// What a session holds: its tokens, and whether its keys and values are those that a fresh pass
// over the tokens gives, by the logits of the last one.
static Ids session_text(const char *path, const Model *m, int ctx, bool *whole) {
    Session s = {0};
    Cache kv;
    Context c = {0};
    cache_open(&kv, m, ctx, 1);
    session_open(&s, path, &kv, &c);
    int n = (int)c.ids.n, row = m->c.vocab_size;
    Ids ids = {get(c.ids.n, sizeof(int)), c.ids.n, 0};
    if (n) memcpy(ids.ids, c.ids.ids, c.ids.n * sizeof(int));
    *whole = c.done >= n - 1 && c.done <= n;
    if (c.done && *whole) {
        const float *fresh = fresh_logits(m, ids.ids, c.done);
        const float *kept = prefill(m, &kv, 0, ids.ids, c.done - 1, c.done);
        *whole = !memcmp(fresh + (c.done - 1) * row, kept, (size_t)row * sizeof(float));
    }
    close(s.fd), cache_close(&kv);
    free(c.ids.ids);
    return ids;
}

// A run on a session is killed or interrupted at a random moment: what is left is whole, and the
// next run goes on from it. With room for 300 tokens it is often rewritten.
static void test_kills(const Model *m, const Tokenizer *t, int ctx) {
    enum { MOST = 3000, ROUNDS = 30 };
    int *expected = get(MOST, sizeof(int)), cut = 0;
    Ids prompt = ids_of(t, "abc", 3, NULL, true);
    memcpy(expected, prompt.ids, prompt.n * sizeof(int));
    Sampler greedy = sampler_for(m->c.vocab_size, 0, 1, 1);
    Cache kv;
    cache_open(&kv, m, MOST, 1);
    if (ctx > MOST) generate_tokens(m, &kv, &greedy, expected, (int)prompt.n, MOST);
    cache_close(&kv);
    for (int round = 0, before = 0; round < ROUNDS; round++) {
        if (round % 5 == 0) unlink("killed"), before = 0;
        const char *command = text("run endless.bin -S killed -i '%s' -t 0 -n 500 -c %d -d %s",
                                   before ? "" : "abc", ctx, round % 2 ? "endless.bin" : "lookup");
        int number = round % 4 < 2 ? SIGKILL : SIGINT, status;
        status = signalled(command, -1, number, 20000, false);
        if (access("killed", F_OK) || !slurp("killed").n) continue;  // it had not begun
        bool whole = true;
        Ran r = ran_wrong(text("run endless.bin -S killed -i '' -n 2 -t 0 -q -c %d", ctx));
        if (!CHECK(r.status == 0, "a session goes on after signal %d: %d, %s", number, r.status,
                   r.err.p)) continue;
        Ids ids = session_text("killed", m, ctx, &whole);
        CHECK(whole, "a session of %zu tokens is whole after signal %d, and a run of two tokens",
              ids.n, number);
        if (ctx > MOST)
            CHECK((int)ids.n >= before && !memcmp(ids.ids, expected, ids.n * sizeof(int)),
                  "its %zu tokens are those of an undisturbed run", ids.n);
        cut += status != 0;
        before = (int)ids.n;
    }
    CHECK(cut > 3, "sessions were cut while they were written: %d", cut);
}

// A file with a byte changed, or cut: refused as it is, or used.
static void test_damaged_sessions(void) {
    ran("rm -f kv; run endless.bin -S kv -i 'abc abc' -n 20 -s 3 -c 300");
    Buffer whole = slurp("kv");
    for (size_t i = 0; i < sizeof(SessionHeader) + 40; i++)
        for (int bit = 0; bit < 8; bit += i < sizeof(SessionHeader) ? 3 : 7) {
            Buffer b = copy(&whole);
            b.p[i] ^= (uint8_t)(1 << bit);
            keep("damaged", &b);
            Ran r = ran_wrong("run endless.bin -S damaged -n 5 -t 0 -q -j 1");
            Buffer after = slurp("damaged");
            CHECK((is_refused(&r, 1, "damaged") && equal(&b, &after)) ||
                      (r.status == 0 && i >= offsetof(SessionHeader, n)),
                  "a session with bit %d of byte %zu changed: %d, %s", bit, i, r.status, r.err.p);
        }
    Ran right = ran("cp kv damaged; run endless.bin -S damaged -n 5 -t 0 -q");
    for (size_t n = 1; n < whole.n; n += n / 4 + 1) {  // keys and values are computed again
        Buffer b = bytes_of(whole.p, n);
        keep("damaged", &b);
        Ran r = ran_wrong("run endless.bin -S damaged -n 5 -t 0 -q -j 1");
        Buffer after = slurp("damaged");
        CHECK((is_refused(&r, 1, "damaged") && equal(&b, &after)) ||
                  (r.status == 0 && equal(&r.out, &right.out) && n > sizeof(SessionHeader)),
              "a session cut to %zu bytes is refused, or has the same text: %s", n, r.err.p);
    }
    for (size_t i = sizeof(SessionHeader) + SESSION_HASH; i < whole.n; i += i / 3) {
        Buffer b = copy(&whole);
        b.p[i] ^= 64;
        keep("damaged", &b);
        Ran r = ran("run endless.bin -S damaged -n 5 -t 0 -q -j 1");
        CHECK(equal(&r.out, &right.out), "a page with byte %zu changed is computed again", i);
    }
    whole.p[7]--, keep("damaged", &whole);
    refused(1, "version", "run endless.bin -S damaged -n 3");
}

static void test_refused_sessions(void) {
    ran("rm -f kv; run endless.bin -S kv -i abc -n 9 -t 0 -c 300");
    Buffer before = slurp("kv");
    refused(1, "another model", "run tiny.bin -S kv -n 3");
    refused(1, "longer than", "run endless.bin -S kv -n 3 -c 9");
    refused(1, "not a session", "run endless.bin -S tiny.tok -n 3");
    refused(1, "the session .", "run endless.bin -S . -n 3");
    refused(1, "context", "run endless.bin -S kv -m logits -f ids -c 300");
    refused(1, "no/kv", "run endless.bin -S no/kv -i a -n 3 -q");
    refused(1, "prompt", "rm -f new; run endless.bin -S new -c 4 -i 'a bad cab, a dab'");
    refused(1, "nothing", "run endless.bin -S new -d nothing -i a");
    refused(2, "overwrite", "echo true >any; run tiny.bin -i a --schema any -o any");
    refused(2, "overwrite", "rm -f kv2; run endless.bin -S ./kv2 -o $PWD/kv2 -i a -n 3 -q");
    survived("run endless.bin -S new -i a -n 3 -q");  // what is left of it is an empty file
    int fd = open("kv", O_RDWR);  // another program has it open: here the tests themselves
    if (fcntl(fd, F_SETLK, &(struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET})) abort();
    refused(1, "in use", "run endless.bin -S kv -n 3");
    Ran r = ran("printf 'ab\\n/save kv\\n/load kv\\n' | chat -c 300");
    const char *first = strstr((char *)r.err.p, "in use");
    CHECK(cut_out("chat") || (r.status == 1 && first && strstr(first + 1, "in use")),
          "a session that is open is neither saved to nor loaded: %s", r.err.p);
    Buffer after = bytes_of(NULL, before.n);
    CHECK(pread(fd, after.p, after.n, 0) == (ssize_t)before.n && equal(&before, &after),
          "a refused session is left untouched");
    close(fd);
    refused(1, "context", "rm -f kv; run endless.bin -S kv -m logits -f full -c 300 -o out; "
                          "run endless.bin -S kv -m logits -i 1 -c 300");
    survived("printf '/load kv\\nabc\\n' | chat -c 256");
}

static void test_sessions(void) {
    if (no_program()) return;
    Model m;
    Tokenizer t = {0};
    load_model(&m, "endless.bin");
    find_tokenizer(&t, NULL, &m);
    Buffer ids = bytes_of("", 0);
    for (int i = 0; i < 400; i++) put_text(&ids, "5 ");
    keep("ids", &ids), save("full", ids.p, 600);
    test_refused_sessions();
    test_damaged_sessions();
    test_kills(&m, &t, 1 << 13);
    test_kills(&m, &t, 300);
    free_tokenizer(&t), free_model(&m);
}
#else
static void test_sessions(void) {}
#endif

// ==== 11. What forward lets be seen, and explain =================================================

// Follows the stages of a batch: their order, and what attention weighs, by another way.
enum { SEEN = 30 };
typedef struct { const Made *made; int layer, at, misplaced; double worst, off; } Watched;
static const char *const stage_names[] = {
    "attention_in", "wq wk wv", "position", "attend", "wo", "feed_forward_in", "router", "route",
    "arrive", "w_gate w_up", "activate", "w_down", "leave", "feed_forward_out"};

static void check_weights(Watched *w, const Pass *f) {
    const Config *c = &f->m->c;
    const Shape *s = &w->made->s;
    int hd = c->head_dim, shared = c->n_heads / c->n_kv_heads;
    for (int i = 0; i < f->n; i++)
        for (int h = 0; h < c->n_heads; h++) {
            const Tensor *sinks = &w->made->layer[f->layer][SINK];
            double p[SEEN], q[64], sink = sinks->bytes ? exp((double)sinks->values[h]) : 0;
            double sum = sink, all = 0;
            const float *given = f->s->scores + (i * c->n_heads + h) * f->s->scores_width;
            for (int d = 0; d < hd; d++) q[d] = (double)f->s->q[(i * c->n_heads + h) * hd + d];
            if (s->embedding >= Q8) round_activations(q, hd, 32, false);
            int first = s->window && s->local >> f->layer & 1 ? i - s->window + 1 : 0;
            for (int t = 0; t <= i; t++) {
                CacheHead head = {f->kv, 0, f->layer, h / shared};
                Matrix keys = cache_keys(f->kv, head_at(&head, t));
                p[t] = 0;
                for (int d = 0; d < hd; d++) p[t] += q[d] * (double)weight(&keys, t, d);
                p[t] *= (double)c->attn_scale;
                if (s->features & CAPS) p[t] = 2 * tanh(p[t] / 2);
                p[t] = t < first ? 0 : exp(p[t]);
                sum += p[t], all += (double)given[t];
            }
            for (int t = 0; t <= i; t++)
                w->worst = worse(w->worst, fabs(p[t] / sum - (double)given[t]));
            w->off = worse(w->off, fabs(all + sink / sum - 1));
        }
}
static void look(void *context, const Pass *f, const char *stage) {
    Watched *w = context;
    int layers = w->made->s.layers;
    bool in_layer = w->layer >= 0 && w->layer < layers;
    const char *expected = w->layer < 0 ? "embed" : in_layer ? stage_names[w->at]
                                                  : w->at ? "classifier" : "last";
    w->misplaced += strcmp(stage, expected) || f->layer != w->layer;
    if (!strcmp(stage, "attend")) check_weights(w, f);
    w->at += w->layer >= 0;
    if (in_layer && !has_experts(&w->made->s, w->layer))
        w->at = w->at == 6 ? 9 : w->at == 12 ? 13 : w->at;  // stages of experts
    if (w->layer < 0 || (in_layer && w->at == 14)) w->layer++, w->at = 0;
}
static void test_watching(const Made *made, const Model *m) {
    int *ids = random_ids(SEEN, m->c.vocab_size);
    size_t bytes = (size_t)(SEEN * m->c.vocab_size) * sizeof(float);
    float *logits = fresh_logits(m, ids, SEEN);
    Watched w = {.made = made, .layer = -1};
    Slot batch[SEEN];
    for (int i = 0; i < SEEN; i++) batch[i] = (Slot){ids[i], i, 0, true};
    Cache kv;
    void (*usual)(const Pass *) = attention;
    cache_open(&kv, m, SEEN, 1);
    watch = look, watcher = &w, attention = attention_plain;
    bool alike = !memcmp(logits, forward(m, &kv, batch, SEEN), bytes);
    watch = NULL, attention = usual;
    cache_close(&kv);
    CHECK(alike && w.layer == made->s.layers && w.at == 2 && !w.misplaced,
          "%s: watching changes no bit, and sees all stages in their order: %d are not",
          name_of(made), w.misplaced);
    CHECK(w.off < 1e-5 && w.worst < 1e-5, "%s: the weights of a head are softmax(q k), off by %g, "
          "and add up to 1, off by %g", name_of(made), w.worst, w.off);
}

#ifndef NO_EXPLAIN
static void test_characters(void) {
    static const struct { const char *text, *shown; } cases[] = {
        {"a", "a"}, {"\\", "\\"}, {"\n", "\\n"}, {"\x1b[", "\\x1b["}, {"\x7f", "\\x7f"},
        {"\xff", "\\xff"}, {"\xe4\xbd", "\\xe4\\xbd"}, {"\xc2\x9b", "\\xc2\\x9b"},
        {"\xc3\xa9", "\xc3\xa9"}, {"\xe4\xbd\xa0", "\xe4\xbd\xa0"},
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"}, {"\xef\xbf\xbd", "\xef\xbf\xbd"},
        {"\xe2\x80\xae", "\\xe2\\x80\\xae"}, {"\xf3\xa0\x81\x81", "\\xf3\\xa0\\x81\\x81"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Token token = {.text = {cases[i].text, strlen(cases[i].text)}};
        Tokenizer t = {.h.vocab_size = 1, .tokens = &token};
        char out[32] = "";
        Explain e = {.w.t = &t, .f = fmemopen(out, sizeof out, "w")};
        explain_token(&e, 0), fclose(e.f);
        CHECK(!strcmp(out, cases[i].shown), "%s is shown as %s", out, cases[i].shown);
    }
}

// What explain writes for a model of the tests, in memory.
static Buffer explained(const Model *m, const Tokenizer *t, Options o) {
    o.temperature = 1, o.top_p = 0.9, o.repeat_penalty = 1, o.seed = 5, o.threads = 1;
    o.layer = o.head = -1, o.quiet = true;
    Output out = {.fd = -1};
    o.input = input_read(o.prompt_file, o.prompt, true);
    explain(&o, m, t, &out);
    free((char *)(uintptr_t)o.input.s);
    Buffer b = bytes_of(out.memory, out.n);
    free(out.memory);
    return b;
}

// UTF-8 without control characters.
static bool is_harmless(const Buffer *b) {
    size_t used;
    for (size_t i = 0; i < b->n; i += used) {
        uint32_t c = next_char((char *)b->p + i, b->n - i, &used);
        bool control = (c < 32 && c != '\n') || (c > 126 && c < 160);
        if (control || (c == 0xfffd && used == 1)) return false;
    }
    return true;
}

// What the program writes to a terminal.
static Buffer on_terminal(const char *command) {
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    char part[4096];
    const char *argv[60] = {0};
    Buffer b = bytes_of("", 0);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) abort();
    int other = open(ptsname(terminal), O_RDWR | O_NOCTTY), null = open("/dev/null", O_RDWR);
    words_of(text("%s", command), argv);
    pid_t pid = start(argv, (int[]){null, other, other}, 30);
    close(other), close(null);
    for (ssize_t n; (n = read(terminal, part, sizeof part)) > 0;) put(&b, part, (size_t)n);
    close(terminal);
    CHECK(status_of(pid) == 0, "%s works on a terminal", command);
    return b;
}
// Without escape sequences and carriage returns.
static Buffer stripped(const Buffer *b) {
    Buffer s = bytes_of("", 0);
    for (const char *p = (char *)b->p; *p; p++)
        if (*p == '\033') p = strchr(p, 'm');
        else if (*p != '\r') put(&s, p, 1);
    return s;
}

#ifndef NO_CHAT
// Reads what a terminal shows, up to some text.
static void await_shown(int terminal, const char *what) {
    char shown[4096] = "";
    for (ssize_t n = 0, got = 1; got > 0 && !strstr(shown, what) && n < 4000; n += got) {
        got = read(terminal, shown + n, (size_t)(4095 - n));
        shown[n + (got > 0 ? got : 0)] = 0;
    }
}
// Starts a chat at a terminal of its own, whose keys come one by one then.
static pid_t start_chat(int *terminal) {
    const char *argv[20] = {0};
    char command[] = "run endless.bin -m chat -n 12 -t 0 -c 999 --repeat-penalty 1 -o edited";
    *terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (*terminal < 0 || grantpt(*terminal) || unlockpt(*terminal)) abort();
    int other = open(ptsname(*terminal), O_RDWR | O_NOCTTY);
    words_of(command, argv);
    setenv("TERM", "xterm", 1);
    remove("edited");
    pid_t pid = start(argv, (int[]){other, other, other}, 20);
    close(other);
    await_shown(*terminal, "> ");
    return pid;
}

// Ctrl-C drops a message that was begun, and ends the chat only when no key comes between two of
// them; after a shell has had the terminal (Ctrl-Z, fg) keys come one by one again.
static void test_chat_signals(void) {
    static const char *const begun[] = {"\"\"\"\nab\n/x", "d\\\na", "b"};
    int terminal;
    pid_t pid = start_chat(&terminal);
    struct termios set;
    for (int i = 0; i < 3; i++) {
        bool sent = write(terminal, begun[i], strlen(begun[i])) == (ssize_t)strlen(begun[i]);
        await_shown(terminal, (const char *[]){"  /x", "  a", "> b"}[i]);
        usleep(50000);  // now it reads
        CHECK(sent && kill(pid, SIGINT) == 0, "Ctrl-C comes");
        await_shown(terminal, "> ");
    }
    if (tcgetattr(terminal, &set)) abort();
    set.c_lflag |= ICANON | ECHO;
    if (tcsetattr(terminal, TCSANOW, &set)) abort();
    kill(pid, SIGCONT);
    for (int i = 0; i < 5000 && set.c_lflag & ICANON && !tcgetattr(terminal, &set); i++)
        usleep(1000);
    CHECK(write(terminal, "bd\x02" "c\n\x04", 6) == 6, "keys come");
    char shown[4096];
    while (read(terminal, shown, sizeof shown) > 0) {}
    close(terminal);
    CHECK(status_of(pid) == 0, "Ctrl-D ends a chat after signals");
    same("what Ctrl-C dropped is gone", "cat edited", "echo bcd | chat -o plain; cat plain");
}

// Lines of a chat that are edited at a terminal: keys that are pressed, and the lines they make.
static void test_editing(void) {
    static const struct { const char *keys, *lines; } cases[] = {
        {"xbcd\x01\x1b[3~a\x05\x1b[D\x0b\n", "abc\\n"},
        {"ab c d\x17\x17\x7f\x7f" "cab\n", "acab\\n"},
        {"abc\n\x1b[A\x1b[H\x04\r", "abc\\nbc\\n"},
        {"def\nx\x10\x0e\x15" "a\x02" "b\n", "def\\nba\\n"},
        {"\x1b[200~ab\ncd\x1b[201~\n", "ab\\\\\\ncd\\n"}, {"ab\\\ncd\n", "ab\\\\\\ncd\\n"},
        {"a\xc3\xa9\xe6\x97\xa5\x1b[D\x08" "b\n/exit\nabc\n", "ab\xe6\x97\xa5\\n"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int terminal;
        pid_t pid = start_chat(&terminal);
        char shown[4096];
        const char *keys = text("%s\x04", cases[i].keys);
        bool sent = write(terminal, keys, strlen(keys)) == (ssize_t)strlen(keys);
        while (read(terminal, shown, sizeof shown) > 0) {}
        close(terminal);
        CHECK(sent && status_of(pid) == 0, "keys %zu end the chat", i);
        same("edited lines", text("cat edited; cmp edited edited"),
             text("printf '%s' | chat -o plain; cat plain", cases[i].lines));
    }
}
#endif

static void test_terminal(void) {
    const char *const prompts[] = {
        "abc bad cab", "\x1b[31m\x07\x7f\xc2\x9b \xff\xe4\xbd \xe2\x80\xae\n\n\t.",
        "\xe4\xbd\xa0\xe5\xa5\xbd \xed\x95\x9c\xf0\x9f\x98\x80 e\xcc\x81 \xef\xbf\xbd \xc3\xa9",
        "                                                                                  a ",
        text("%0590d", 0)};
    for (int i = 0; i < 5; i++) {
        Ran r = SH("run endless.bin -m explain -c 999 -i '%s' -n 12 -s 3", prompts[i]);
        CHECK(r.status == 0 && count(&r.out, "== position") == 12 && is_harmless(&r.out),
              "the terminal's view of prompt %d has no control characters: status %d, %.300s", i,
              r.status, r.out.p);
        CHECK(i || (count(&r.out, "\n> the number") == 12 && count(&r.out, "\nlayer 0: ") == 12 &&
                    count(&r.out, "\nabc bad cab") == 12 && count(&r.out, "attention to") == 60),
              "it shows text, choice, attention and layers: %.300s", r.out.p);
        r = SH("run endless.bin -m explain -c 999 -i '%s' -n 1 --trace -s 3", prompts[i]);
        CHECK(r.status == 0 && is_harmless(&r.out) && count(&r.out, "xb = final_norm") == 1,
              "nor has the trace: status %d, %.300s", r.status, r.out.p);
    }
    const char *shown = "run endless.bin -m explain -c 999 -i 'abc bad cab' -n 12 -s 3";
    Ran r = ran(shown);
    for (int i = 0; i < 3; i++) {
        setenv("TERM", i == 1 ? "dumb" : "xterm", 1);
        if (i == 2) setenv("NO_COLOR", "1", 1);
        Buffer colored = on_terminal(shown), plain = stripped(&colored);
        char *legend = strstr((char *)plain.p, "(the redder");
        char *rest = legend ? strchr(legend, '\n') + 1 : NULL;
        if (rest) memmove(legend, rest, strlen(rest) + 1), plain.n = strlen((char *)plain.p);
        CHECK((count(&colored, "\033[48;5;") > 5) == (i == 0) && (legend != NULL) == (i == 0) &&
                  !count(&r.out, "\033") && equal(&plain, &r.out),
              "a terminal shows the same, in colours that it explains, or without: %s", plain.p);
    }
    unsetenv("NO_COLOR");
    Buffer b = on_terminal(text("run endless.bin -i %01200d -n 1 -s 1 -c 2000", 0));
    CHECK(count(&b, " tokens/s ") && count(&b, text("\r%50s\r0000", "")),
          "a long prompt shows how far it is, and nothing of that stays: %s", b.p);
#ifndef NO_EACH
    b = on_terminal("run endless.bin -i 'abc bad cab{}' --each lines -n 99 -s 5 -q");
    CHECK(b.n > 500 && !count(&b, "\033"), "no line's answer is obeyed: %s", b.p);
#endif
#ifndef NO_TOOLS
    b = on_terminal("run endless.bin -T cat -i 12+34= -n 1 -t 0");
    CHECK(count(&b, "\033[2m12+34\033[0m"), "a tool's answer is dimmed: %s", b.p);
#endif
}

// The texts of a page's tokens, joined, of the prompt's and of those generated, and what they
// decode to, without the first one if it is BOS.
static Buffer page_tokens(const Tokenizer *t, const Buffer *page, Buffer texts[2]) {
    Buffer ids = {0};
    for (char *p = (char *)page->p; (p = strstr(p, "`,t:\"")) != NULL;) {
        char *end = strstr(p, "\",id:"), *given = end ? strstr(end, "given:") : NULL;
        if (!given) break;
        put(&texts[given[6] == '0'], p + 5, (size_t)(end - p - 5));
        int id = atoi(end + 5);
        if (ids.n || id != t->h.bos) put(&ids, &id, sizeof id);
        p = end;
    }
    return decoded(t, (int *)(void *)ids.p, ids.n / sizeof(int));
}
static void test_page(void) {
    const char *hostile = "</script><img src=x onerror=alert(1)> \"\\ &lt; \xe2\x80\xa8\x01\xff"
                          "\n\n";
    const char *escaped = "\\x3c/script>\\x3cimg src=x onerror=alert(1)> \\x22\\x5c &lt; "
                          "\\\\xe2\\\\x80\\\\xa8\\\\x01\\\\xff\\\\n";
    const char *options_[] = {"-t 1", "-t 0", "-t 1.5 -p 1 --top-k 3", "-t 1 -p 1"};
    Model m;
    Tokenizer t = {0};
    load_model(&m, "tiny.bin");
    find_tokenizer(&t, NULL, &m);
    for (int i = 0; i < 4; i++) {
        Buffer texts[2] = {{0}, {0}};
        save("hostile", i == 3 ? "abc bad cab" : hostile, strlen(i == 3 ? "abc bad cab" : hostile));
        const char *how = text("-f hostile -n 40 -s 7 -q %s", options_[i]);
        Ran r = SH("run tiny.bin -m explain %s -o page.html", how);
        Buffer page = slurp("page.html"), bytes = page_tokens(&t, &page, texts);
        CHECK(r.status == 0 && page.n < 300000 && !memcmp(page.p, "<!doctype html>", 15) &&
                  count(&page, "\n</script>\n") == 1 && count(&page, "</html>") == 0,
              "a page of 60 tokens has %zu bytes: %s", page.n, r.err.p);
        CHECK(i == 3 || is_text(&texts[0], escaped), "it has the prompt, escaped: %s", texts[0].p);
        const char *made = (const char *[]){"seed 7: temperature 1, ", "seed 7: temperature 0, ",
                                            "top-p 1, top-k 3,", "top-p 1, top-k 0, "}[i];
        CHECK(count(&page, made) == 1 && count(&page, "\"explain\", \"-f\", ") == 1,
              "and says how it was made");
        CHECK(count(&page, "<script") == 1 && count(&page, "</script") == 1 &&
                  count(&page, "http") == 1 && count(&page, "url(") == 0,
              "and nothing in it is an element, or an address elsewhere");
        put_text(&bytes, "\n");
        prints_bytes("a page holds the text that generate writes with the same options", &bytes,
                     text("run tiny.bin %s", how));
    }
    free_tokenizer(&t), free_model(&m);
}
#endif

static void test_explain(void) {
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            Made made = tiny_model(which, dtype);
            Model m = open_made(&made, "explain.bin");
            set_threads(dtype % 2 ? 3 : 1);
            test_watching(&made, &m);
            free_model(&m);
        }
    set_threads(1);
#ifndef NO_EXPLAIN
    test_characters();
    if (no_program()) return;
    test_page();
    test_terminal();
#ifndef NO_CHAT
    test_editing();
    test_chat_signals();
#endif
#endif
}

// ==== 12. Compression ============================================================================

static Buffer letters_of(size_t n) {
    Buffer b = {0};
    while (b.n < n) {
        size_t length = 1 + (size_t)below(2);
        put(&b, &"a bad cab, dad\n\xc3\xa9"[below(16)], length);
    }
    return b;
}
#ifndef NO_COMPRESS

static Buffer coded(const Model *m, const Tokenizer *t, const Buffer *b, bool back, int context) {
    Options o = {.mode = back ? "decompress" : "compress", .prompt_file = keep("in", b),
                 .context = context, .threads = 1, .quiet = true};
    Output out = {.fd = -1};
    o.input = input_read(o.prompt_file, o.prompt, false);
    compress(&o, m, t, &out);
    free((char *)(uintptr_t)o.input.s);
    Buffer result = bytes_of(out.memory, out.n);
    free(out.memory);
    return result;
}
// Compresses and gives back. Returns the compressed size; *same: whether it came back.
static size_t round_trip(const Model *m, const Tokenizer *t, const Buffer *b, int context,
                         bool *ok) {
    Buffer small = coded(m, t, b, false, context), again = coded(m, t, &small, true, 0);
    *ok = equal(b, &again);
    return small.n;
}

static const char *const odd_texts[] = {
    "<s>", "<|end|>", "<unk>", "a<s>b</s>", "<0x41>", " ", "  ", "   a", " a ", "\n", "\r\n",
    "a\r\nb\r\n", "\r\r\n\n", "\t\t", "caf\xc3\xa9", "\xc3", "\xc3\xa9\xc3", "\xe2\x82",
    "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf0\x9f\x98", "\xed\xa0\x80", "\xc0\x80", "\xff\xfe",
    "\xef\xbf\xbd", "\xef\xbb\xbf" "a bad cab", "\x80\x80\x80", "a\xff" "b\xff" "c",
    "0123456789012345678901234567890", "abcabcabcabcabcabcabc", "a bad cab, a dab: d",
    "\xe3\x80\x80\xe4\xbd\xa0\xe5\xa5\xbd", "\x1b[31mabc\x1b[0m", "\x7f", "aaaaaaaaaaaaaaaa",
    "\xe2\x96\x81" "a\xe2\x96\x81", "n\xcc\x83", "'s 't 're", "<|im_start|>user\nabc<|im_end|>",
    "a\n\n\n\n\nb", "                                b"};

// Input number i of the adversarial ones, or false: each byte, odd texts, noise of several kinds.
static bool odd_input(int i, Buffer *b) {
    int n_texts = (int)(sizeof odd_texts / sizeof *odd_texts);
    static const char letters[] = "abc d\n";
    *b = bytes_of("", 0);
    if (i < 256) return put(b, &(char){(char)i}, 1), true;
    if ((i -= 256) < n_texts) return put_text(b, odd_texts[i]), true;
    i -= n_texts;
    int n = i < 20 ? i * i * 4 : 2000;
    for (int j = 0; j < n && i < 24; j++) {
        uint32_t c = (uint32_t)(i % 4 == 1 ? below(256) : i % 4 == 3 ? 32 + below(95) : 0);
        if (i % 4 == 0) c = (uint8_t)letters[below(6)];
        if (i % 4 == 2) c = (uint8_t)(below(30) ? letters[below(6)] : below(256));
        put(b, &(char){(char)c}, 1);
    }
    if (i == 24) for (int j = 0; j < 1024; j++) put(b, &(char){(char)j}, 1);
    if (i == 25) for (int j = 0; j < 2000; j++) put(b, &"\xe2\x82\xac" "a\xc3\xa9"[below(6)], 1);
    if (i == 26 || i == 27) put(b, memset(get(20000, 1), i == 26 ? 'a' : 0, 20000), 20000);
    return i < 28;
}

// Each input comes back, and noise grows by at most 2%, a header and learning that it is noise.
static void test_round_trips(const Model *m, const Tokenizer *t, const char *name) {
    Buffer b;
    bool ok;
    for (int i = 0; odd_input(i, &b); i++) {
        size_t n = round_trip(m, t, &b, (int[]){0, 200, 64}[i % 3], &ok);
        CHECK(ok, "%s: input %d of %zu bytes comes back", name, i, b.n);
        CHECK(n < b.n + b.n / 50 + 160, "%s: input %d of %zu bytes grows to %zu", name, i, b.n, n);
        if (b.n == 20000) CHECK(n < 500 || !b.p[0], "%s: 20000 times a: %zu bytes", name, n);
    }
}

// A text of several waves: the same file however it is computed, and it becomes small.
static void test_waves(const Model *m, const Tokenizer *t) {
    Buffer b = letters_of(6000), small = coded(m, t, &b, false, 128), noise = letters_of(1000);
    bool ok;
    for (int i = 0; i < 3; i++) {  // on three threads, on one, plain
        Matmul *fast = matmul;
        set_threads(i ? 1 : 3);
        if (i == 2) matmul = matmul_plain;
        Buffer again = coded(m, t, &b, false, 128), back = coded(m, t, &small, true, 0);
        matmul = fast;
        CHECK(equal(&small, &again) && equal(&b, &back), "way %d: the same file, and back", i);
    }
    CHECK(round_trip(m, t, &b, 0, &ok) < b.n * 3 / 5 && ok, "6000 bytes of a few letters shrink");
    for (int i = 0; i < 500; i++) put(&noise, &(char){(char)(33 + below(94))}, 1);
    put(&noise, b.p, 1000);
    round_trip(m, t, &noise, 0, &ok);
    CHECK(ok, "noise between texts comes back");
}

// A byte-level tokenizer, two of SentencePiece (with and without byte tokens), one of llama2.c.
static const char *const compression_names[] = {
    "byte-level", "SentencePiece", "SentencePiece without bytes", "llama2.c"};
static void compression_pair(int which, Model *m, Tokenizer *t) {
    static const int families[] = {LLAMA, GEMMA, QWEN2, LLAMA}, dtypes[] = {Q8, F32, Q4A, ROWS};
    Shape s = family(families[which], dtypes[which]);
    s.layers = 2, s.seq_len = 1000, s.vocab = 266;
    Vocabulary *v = which ? new_vocabulary(SENTENCEPIECE) : tiny_vocabulary();
    if (which == 1 || which == 2) {
        v->flags |= ADD_BOS | DROP_SPACE;
        step(v, REPLACE, 0, "", " ");
        v->unk = word(v, "<unk>", CONTROL), v->bos = word(v, "<s>", CONTROL);
        if (which == 1) all_bytes(v);
        for (int i = 0; i < 6; i++) token(v, &" abcd\n"[i], 1, -1000, NORMAL);
        token(v, "\xc3\xa9", 2, -1000, NORMAL);
        random_merges(v, " abcd", 30);
        word(v, "\n\n", USER_DEFINED);
    }
    if (which < 3) s.vocab = v->n;
    Made made = make_weights(&s);
    save_model("squeeze", &made, v);
    load_model(m, "squeeze.bin");
    find_tokenizer(t, NULL, m);
}

static void test_damaged_files(void) {
    Buffer b = bytes_of("a bad cab: dada bab\xff\n", 21);
    keep("in", &b);
    Ran r = ran("run tiny.bin -m compress -f in -q -o whole; run tiny.bin -m decompress -f whole");
    Buffer small = slurp("whole");
    CHECK(r.status == 0 && equal(&r.out, &b) && small.n < 80, "21 bytes become %zu: %s", small.n,
          r.err.p);
    for (size_t i = 0; i < small.n * 4; i++) {  // half of all bits, and all lengths
        Buffer bad = i % 4 ? copy(&small) : bytes_of(small.p, i / 4);
        if (i % 4) bad.p[i / 4] ^= (uint8_t)(1 << (i * 5 % 8));
        keep("bad", &bad);
        refused(1, "bad", "run tiny.bin -m decompress -f bad -q -j 1");
    }
    put(&small, "", 1), keep("bad", &small);
    refused(1, "bad", "run tiny.bin -m decompress -f bad -q");
    small.p[3]--, keep("bad", &small);
    refused(1, "another version", "run tiny.bin -m decompress -f bad -q");
}

static void test_compression(void) {
    for (int which = 0; which < 4; which++) {
        Model m;
        Tokenizer t = {0};
        compression_pair(which, &m, &t);
        test_round_trips(&m, &t, compression_names[which]);
        if (which < 2) test_waves(&m, &t);
        free_tokenizer(&t), free_model(&m);
    }
    if (no_program()) return;
    test_damaged_files();
}
#else
static void test_compression(void) {}
#endif

// ==== 13. The same bytes from every build ========================================================

// What every build must give. HASHES=1 prints the table as it is now.
static const struct { const char *what; uint64_t hash; } known[] = {
    {"llama f32", 0x2f9e1a40e8003ca9}, {"llama bf16", 0x645b7bef751e8122},
    {"llama q8", 0x4f3349244bd61a5b}, {"llama q4", 0xd4f2fc4011559ba6},
    {"llama q4a", 0x8c7476e7396c8d4b}, {"qwen2 f32", 0x31b2451ac5a4314b},
    {"qwen2 bf16", 0x55bfe9564305c8ad}, {"qwen2 q8", 0x8bd96d76d5ebf234},
    {"qwen2 q4", 0xef6da2a1c7fe9e05}, {"qwen2 q4a", 0x60f4f96cfaad4fa5},
    {"qwen3 f32", 0xb4bbbbe1743464ca}, {"qwen3 bf16", 0xa8f9bca812a673bc},
    {"qwen3 q8", 0xd056c8a448d50e93}, {"qwen3 q4", 0x112389905cd22417},
    {"qwen3 q4a", 0x393a01db0d952204}, {"gemma f32", 0x4586d142787b1dc5},
    {"gemma bf16", 0x9ba59123dbb1edfb}, {"gemma q8", 0x37267c49ac903e17},
    {"gemma q4", 0xb007b4317b96144c}, {"gemma q4a", 0xba3b870c4f7dfb94},
    {"gpt f32", 0x6a044846958f98c5}, {"gpt bf16", 0xf928248c2abbc203},
    {"gpt q8", 0x58bd2c3896d5e933}, {"gpt q4", 0x1457f103f6b92b35}, {"gpt q4a", 0x52604ff1afb3fe7e},
    {"neox f32", 0x0177bf5f4e175316}, {"neox bf16", 0xc32943378de33a05},
    {"neox q8", 0xfd648cc959d9a45b}, {"neox q4", 0x964fec642837bf3c},
    {"neox q4a", 0x26a0509ad05c6711}, {"olmo f32", 0xcfc8a4017ca8dccc},
    {"olmo bf16", 0x92a40f4b6af28ca0}, {"olmo q8", 0xc59cb3f19b7d0600},
    {"olmo q4", 0xf1702bc6b4620ccc}, {"olmo q4a", 0x15feb5a7f9c982c3},
    {"oss f32", 0x23ab41de6a542120}, {"oss bf16", 0x7510d57b963a99e2},
    {"oss q8", 0x3b4b1fd69e203a19}, {"oss q4", 0xd0e118cdf678acb0}, {"oss q4a", 0x7301e341a13e3de6},
    {"glm f32", 0x1f2ac10d84b45f6e}, {"glm bf16", 0x91294d7809db7e67},
    {"glm q8", 0xbd9feff4be87c782}, {"glm q4", 0x847f89f3ea66196d}, {"glm q4a", 0xd541238441009139},
    {"traces", 0xbbe72c883a0929bd}, {"byte-level", 0xa585dab20af6b5c0},
    {"SentencePiece", 0xb8026c5b40481d68}, {"SentencePiece without bytes", 0x942fe336a777a621},
    {"llama2.c", 0x3f20060a9f65f5de}
};

static void same_hash(const char *what, uint64_t hash) {
    uint64_t expected = 0;
    if (getenv("HASHES")) printf("    {\"%s\", 0x%016llx},\n", what, (unsigned long long)hash);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].what, what)) expected = known[i].hash;
    CHECK(hash == expected, "%s has hash 0x%016llx in %s", what, (unsigned long long)hash, isa);
}

static void test_same_bytes(void) {
    enum { N = 290 };  // two pages
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            random_state = (uint64_t)(1000 + which * 10 + dtype);
            Shape s = family(which, dtype);
            Made made = make_weights(&s);
            Model m = open_made(&made, "hash.bin");
            const float *logits = fresh_logits(&m, random_ids(N, m.c.vocab_size), N);
            same_hash(name_of(&made), hash64(logits, (size_t)(N * m.c.vocab_size) * sizeof(float)));
            free_model(&m);
        }
#ifndef NO_EXPLAIN
    uint64_t hash = 0;
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            random_state = (uint64_t)(2000 + which * 10 + dtype);
            Vocabulary *v = tiny_vocabulary();
            Tokenizer t = open_tokenizer(v, "trace.tok");
            Made made = tiny_model(which, dtype);
            Model m = open_made(&made, "trace.bin");
            Options o = {.prompt = "abc", .trace = true, .steps = 12, .context = 40};
            Buffer trace = explained(&m, &t, o);
            hash = mix64(hash + hash64(trace.p, trace.n));
            free_tokenizer(&t), free_model(&m);
        }
    same_hash("traces", hash);
#endif
#ifndef NO_COMPRESS
    for (int which = 0; which < 4; which++) {  // a compressed file
        random_state = (uint64_t)(5000 + which);
        Model m;
        Tokenizer t = {0};
        compression_pair(which, &m, &t);
        Buffer b = letters_of(2500), small = coded(&m, &t, &b, false, 0);
        same_hash(compression_names[which], hash64(small.p, small.n));
        Buffer back = coded(&m, &t, &small, true, 0);
        CHECK(equal(&back, &b), "%s: the text comes back", compression_names[which]);
        free_tokenizer(&t), free_model(&m);
    }
#endif
}

// ==== 14. Faults: every function that can fail is made to, once (`make test-faults`) =============

// Runs the program with the nth call of a function failing, or with two signals just before it.
// True if it failed.
static bool inject(const char *command, const char *function, int n, bool signals) {
    unlink("result"), unlink("session"), unlink("saved");
    save("input", "abc\n/save saved\nd\n", 18), save("stdout", "", 0), save("stderr", "", 0);
    int files = files_here();
    setenv("FAULT", text("%s:%d", function, n), 1);
    if (signals) setenv("FAULT_SIGNALS", "1", 1);
    Ran r = ran_wrong(command);
    unsetenv("FAULT"), unsetenv("FAULT_SIGNALS");
    struct stat st;
    bool session = !stat("session", &st);
    const char *what = text("%s, %s%s %d", command, signals ? "signals before " : "", function, n);
    CHECK(r.status == 0 || (signals ? r.status > 128 && r.status < 144
                                    : r.status == 1 && strstr((char *)r.err.p, "run: ")),
          "%s: status %d, %s", what, r.status, r.err.p);
    CHECK(r.status != 1 || session || access("result", F_OK), "%s: no half-written file", what);
    if (session && r.status) {  // what is left of a session opens
        Ran next = ran("run endless.bin -S session -n 2 -s 1 -q");
        CHECK(next.status == 0, "%s: the session goes on: %s", what, next.err.p);
    }
    unlink("result"), unlink("session"), unlink("saved");
    CHECK(files_here() == files, "%s: no other file is left", what);
    return r.status == 1;
}

static void test_faults(void) {
    static const char *const names[] = {
        "open", "fcntl", "write", "fsync", "rename", "realloc", "malloc", "posix_memalign", "mmap",
        "fstat", "read", "pread", "fork", "tmpfile", "pthread_create", "getline", "open_memstream"};
    enum { AROUND_FILES = 6 };  // the first ones: signals come before them, too
    static const char *const commands[] = {
        "-i abc -n 5 -j 3", "-i abc -n 5 -o result", "-i abc -n 5 -k 3", "-i abc -n 5 -S session",
        "-i abc -n 90 -c 40 -S session", "-i 1+1= -n 3 -T cat", "-i abc -n 5 -d lookup",
        "-m chat -n 3 -c 99 -o result <input", "-m chat -n 9 -c 40 -S session <input",
        "-m eval -f prompt -o result", "-m compress -f prompt -o result",
        "-m decompress -f small -o result", "-m explain -i abc -n 2 -c 99 -o result",
        "-m tokenize -f prompt", "-m logits -i '1 2 3'", "-i abc -e endless.bin"};
    if (!getenv("FAULTS")) {
        skip(1, "functions that fail, which needs a build of its own: make test-faults");
        return;
    }
    if (no_program()) return;
    save("prompt", "abc d abc d cab 12", 18);
    ran("run endless.bin -m compress -f prompt -o small -q");
    int injected = 0;
    for (size_t c = 0; c < sizeof commands / sizeof *commands; c++)
        for (size_t f = 0; f < sizeof names / sizeof *names; f++)
            for (int n = 1; n <= 40; n = n < 8 ? n + 1 : n * 2) {
                const char *command = text("run endless.bin -s 1 -q %s", commands[c]);
                injected += inject(command, names[f], n, false);
                if (f < AROUND_FILES) inject(command, names[f], n, true);
            }
    printf("  %d failures injected\n", injected);
}

// ==== 15. Signals at random moments, in every mode (ROUNDS=500 for more of them) =================

static void test_signals(void) {
    if (no_program()) return;
    for (int round = 0; round < 20; round++) {  // one signal ends a program that waits for input
        int ends[2];
        if (pipe(ends)) abort();
        int status = signalled("run endless.bin -i - -o result -q", ends[0], SIGINT, 4000, false);
        close(ends[0]), close(ends[1]);
        CHECK(status == 130 && access("result", F_OK),
              "Ctrl-C ends a program that waits, and there is no output: status %d", status);
    }
    int status = signalled("run endless.bin -i abc -n 0 -s 1", -1, SIGINT, 60000, false);
    Buffer b = slurp("stdout");
    CHECK(status == 130 && b.n && b.p[b.n - 1] == '\n', "Ctrl-C ends a text: %d, %zu", status, b.n);
    Buffer big = letters_of(20000);
    keep("long", &big), save("ids", "1 2 3 4 5 6 7 8 9", 17);
    save("slow", "sleep 1; touch late", 19);
    ran("run endless.bin -m compress -f long -o small -q");
    static const char *const commands[] = {
        "-i abc -n 0 -j 2", "-i abc -n 100000 -o result", "-i abc -n 90000 -k 3 -o result",
        "-i abc -n 90000 -e endless.bin -o result", "-i abc -n 90000 -S session -c 4096",
        "-i 1+1= -n 3 -T '. ./slow'", "-i abc -n 90000 -d lookup",
        "-m chat -n 90000 -i abc", "-m eval -f long -o result", "-m compress -f long -o result",
        "-m decompress -f small -o result", "-m explain -i abc -n 900 -c 999 -o result",
        "-m logits -f ids -o result"};
    int n = sizeof commands / sizeof *commands,
        rounds = getenv("ROUNDS") ? atoi(getenv("ROUNDS")) : 60;
    for (int round = 0; round < rounds; round++) {
        const char *command = text("run endless.bin -s 1 -q %s", commands[round % n]);
        if (cut_out(command)) continue;
        unlink("session");
        int files = files_here(), number = (int[]){SIGINT, SIGTERM, SIGHUP}[below(3)];
        save("result", "old", 3);
        status = signalled(command, -1, number, 30000, below(3) == 0);
        struct stat st;
        CHECK(status == 0 || status == 130 || status == 129 || status == 143,
              "%s with signal %d ends with %d", command, number, status);
        CHECK(!stat("result", &st) && st.st_size, "-o is what it was, or a result: %s", command);
        unlink("result"), unlink("session");
        CHECK(files_here() <= files, "%s leaves no temporary file", command);
    }
    usleep(1100000);
    CHECK(access("late", F_OK), "no tool outlives a program that was stopped");
}

// ==== 16. What is unlikely, or meant ill =========================================================

static void fill(Tensor *t, float value) {
    for (size_t i = 0; i < t->n; i += 4) set_float(t->bytes + i, value);
}
// Whatever the text, one token has a logit that is by far the greatest.
static void test_great_losses(float logit) {
    Shape s = family(LLAMA, ROWS);
    s.vocab = 266, s.layers = 1, s.dim = 16, s.hidden = 16, s.heads = s.kv_heads = 1;
    Made m = make_weights(&s);
    Tensor *ones[] = {&m.embedding, &m.final_norm, &m.layer[0][ATTN_NORM], &m.layer[0][FFN_NORM]};
    for (int i = 0; i < 4; i++) fill(ones[i], 1);
    fill(&m.layer[0][WO], 0), fill(&m.layer[0][DOWN], 0), fill(&m.classifier, 0);
    for (int i = 0; i < 16; i++) set_float(m.classifier.bytes + 4 * (5 * 16 + i), logit / 16);
    save_model("lossy", &m, NULL);
    const char *commands[] = {"run lossy.bin -m eval -i abc -q",
                              "run lossy.bin -m eval -i abc -q --logprobs 2",
                              "echo abc | run lossy.bin -m eval --each - -q"};
    for (int i = 0; i < 3; i++) {
        if (cut_out(commands[i])) continue;
        Ran r = ran(commands[i]);
        int expected[] = {6, 3, 1};
        CHECK(r.status == 0 && strlen((char *)r.out.p) == r.out.n && r.out.p[r.out.n - 1] == '\n' &&
                  lines(&r.out) == expected[i],
              "%s prints whole lines where a loss is %g: %s", commands[i], (double)logit, r.out.p);
    }
}

// x of which mix64 makes z.
static uint64_t unmixed(uint64_t z) {
    z ^= z >> 31 ^ z >> 62;
    z *= 0x319642b2d24d8ec3u;
    z ^= z >> 27 ^ z >> 54;
    z *= 0x96de1b173f119089u;
    return z ^ z >> 30 ^ z >> 60;
}
// Tokenizers that are made to take long: their tokens have one place in a table, one is very long.
static void test_slow_tokenizers(void) {
    enum { N = 60000, LONG = 1024, MANY = 100000 };
    Vocabulary *v = new_vocabulary(BYTE_LEVEL), *w = new_vocabulary(BYTE_LEVEL);
    char *letters = memset(get(MANY + 1, 1), 'a', MANY);
    for (uint64_t i = 0; i < N; i++) {
        uint64_t word_ = unmixed(((i + 1) << 32) - mix64(8)) - 0x9E3779B97F4A7C15u;
        put(&v->tokens, (uint8_t[]){0, 0, 0, 0, NORMAL, 0, 8, 0}, 8), put(&v->tokens, &word_, 8);
        v->n++;
    }
    double began = seconds();
    Tokenizer t = open_tokenizer(v, "slow.tok");
    CHECK(seconds() - began < patience(3) && t.h.vocab_size == N,
          "tokens of equal hashes are read within 3 seconds: %.1f", seconds() - began);
    free_tokenizer(&t);
    all_bytes(w), some_ranges(w);
    word(w, text("%.*s", LONG, letters), CONTROL);
    letters[MANY / 2] = letters[0] + 1;
    t = open_tokenizer(w, "slow.tok");
    began = seconds();
    Ids ids = ids_of(&t, letters, MANY, NULL, false);
    CHECK(seconds() - began < patience(15) && ids.n < MANY, "so is a text of the letters of a "
          "long token: %.1f, %zu tokens", seconds() - began, ids.n);
    free_tokenizer(&t);
}

// What a command, without a shell, prints if its stdin and stdout are pipes that do not block.
static Buffer through_pipes(const char *command, const char *input) {
    int in[2], out[2], null = open("/dev/null", O_WRONLY);
    const char *argv[60] = {0};
    char part[1 << 16];
    words_of(text("%s", command), argv);
    if (pipe(in) || pipe(out)) abort();
    fcntl(in[0], F_SETFL, O_NONBLOCK), fcntl(out[1], F_SETFL, O_NONBLOCK);
    fcntl(in[1], F_SETFD, FD_CLOEXEC), fcntl(out[0], F_SETFD, FD_CLOEXEC);
    pid_t pid = start(argv, (int[]){in[0], out[1], null}, 20);
    close(in[0]), close(out[1]), close(null);
    usleep(200000);
    if (write(in[1], input, strlen(input)) < 0) abort();
    close(in[1]);
    usleep(200000);
    Buffer b = bytes_of("", 0);
    for (ssize_t n; (n = read(out[0], part, sizeof part)) > 0;) put(&b, part, (size_t)n);
    close(out[0]);
    CHECK(status_of(pid) == 0, "%s does not mind pipes that do not block", command);
    return b;
}

static void test_robust(void) {
    test_slow_tokenizers();
    if (no_program()) return;
    test_great_losses(709), test_great_losses(1e17f);
    Buffer ids = bytes_of("", 0);
    for (int i = 0; i < 600; i++) put_text(&ids, "7 ");
    keep("many", &ids);
    Buffer b = through_pipes("run endless.bin -m logits -f - -q", (char *)ids.p);
    CHECK(b.n == 600 * 278 * 4, "all logits come through a pipe that does not block: %zu", b.n);
    prints_bytes("and they are the usual ones", &b, "run endless.bin -m logits -f many -q");
    if (!cut_out("chat")) {
        b = through_pipes("run endless.bin -m chat -n 5 -t 0 -q", "abc\ndef\n");
        prints_bytes("so do answers", &b, "printf 'abc\\ndef\\n' | e -m chat -n 5 -t 0 -q");
    }
    if (mkfifo("fifo", 0600)) abort();
    for (int round = 0; round < 24; round++) {
        bool chat = round % 3 != 0 && !cut_out("chat"), lines_come = round % 3 == 1;
        int ends[2], number = (int[]){SIGTERM, SIGHUP, SIGQUIT}[round / 3 % 3];
        if (pipe(ends)) abort();
        pid_t writer = lines_come ? fork() : -1;
        while (!writer) if (write(ends[1], "\n\n\n\n", 4) < 0) _exit(0);
        int status = signalled(chat ? "run endless.bin -m chat -q" : "run endless.bin -f fifo -q",
                               ends[0], number, 4000, false);
        if (writer > 0) kill(writer, SIGKILL), status_of(writer);
        close(ends[0]), close(ends[1]);
        CHECK(status == 130, "the first signal %d ends %s: %d", number,
              chat ? "a chat" : "a program that waits for a pipe's other end", status);
    }
}

// ==== 17. The forger: files with right hashes and extreme content (FORGED=5000 SEED=2: others) ===

// Numbers that are something else as an int, a float, two halves, or four int8.
static const uint32_t odd_words[] = {
    0, 1, 2, 15, 300, 0x10000, 0x1000000, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fc00180,
    0xffc000ff, 0x7f800000, 0xff800000, 0x7f7fffff, 0xff7fffff, 0x7c007c00, 0xfc00fc00, 0x7e01fe01,
    0x7bfffbff, 0x80018001, 0xbc00bc00, 0x80808080, 0x3f800000, 0xbf800000, 0x61616161, 0x41a00000};
static uint32_t odd_word(void) { return odd_words[below(sizeof odd_words / 4)]; }
// Writes some of them over a part of a file, at even places; now and then over all of a stretch.
static void spoil(Buffer *b, size_t from, size_t end, int times) {
    for (; times > 0 && from + 4 <= end && end <= b->n; times--) {
        size_t at = from + (size_t)below((int)(end - from - 3)) / 2 * 2;
        uint32_t word_ = odd_word();
        int n = below(4) ? 1 : below(64);
        for (int i = 0; i < n && at + 4 <= end; i++, at += 4) memcpy(b->p + at, &word_, 4);
    }
}

// (No call draws two numbers for its arguments: compilers differ in which one would be first.)
static Buffer forged_model(void) {
    int which = below(N_FAMILIES), dtype = F32 + below(6);
    Shape s = family(which, dtype);
    s.embedding = F32 + below(4);
    int kv = 1 + below(3);
    s.vocab = 278, s.layers = 1 + below(2), s.dim = 1 + below(70), s.hidden = 1 + below(70);
    s.kv_heads = kv, s.heads = kv * (1 + below(3)), s.head_dim = 2 + 2 * below(12);
    s.seq_len = below(3) ? 64 : 16 + below(600), s.activation = below(N_ACTIVATIONS);
    s.window = below(2) ? 0 : 1 + below(40), s.local = (unsigned)below(4);
    s.flags = (uint32_t)below(64), s.shared = below(3);
    Made m = make_weights(&s);
    Buffer b = version_5(&m);
    size_t tensors = 512 + 64 * (size_t)read_u32(b.p + 40);
    switch (below(6)) {
    case 0: break;
    case 1: spoil(&b, 112, 236, 1 + below(2)); break;       // sizes and factors
    case 2: spoil(&b, 512, tensors, 1 + below(2)); break;   // the directory
    case 3: {                                               // two tensors change places
        uint8_t *one = b.p + 512 + 64 * below((int)(tensors - 512) / 64), keep_[16];
        uint8_t *two = b.p + 512 + 64 * below((int)(tensors - 512) / 64);
        memcpy(keep_, one + 48, 16), memcpy(one + 48, two + 48, 16), memcpy(two + 48, keep_, 16);
        break;
    }
    default: spoil(&b, tensors, b.n, 1 + below(12));        // weights
    }
    seal(&b);
    return b;
}

static Buffer forged_tokenizer(void) {
    Vocabulary *v = new_vocabulary(below(2) ? BYTE_LEVEL : below(128));
    char s[600];
    int d[4] = {below(64), below(4), below(3), below(16)};
    split(v, d[0], d[3] & 1 ? cl100k_pattern : gpt2_pattern, d[3] >> 1 & 1);
    if (below(3) == 0) step(v, d[1], d[2], d[3] & 4 ? " " : "", d[3] & 8 ? "ab" : "");
    if (below(4)) all_bytes(v);
    if (below(4)) some_ranges(v);
    for (int n = below(3) ? 278 : 1 + below(300); v->n < n;) {
        size_t len = (size_t)(below(9) ? below(8) : below(600));
        for (size_t i = 0; i < len; i++) s[i] = below(5) ? "abc d"[below(5)] : (char)below(256);
        float score;
        memcpy(&score, &(uint32_t){odd_word()}, 4);
        double given = below(4) ? below(9) : (double)score;
        token(v, s, len, given, below(3) ? NORMAL : below(5));
    }
    for (int n = below(60); n > 0; n--) d[0] = below(v->n), merge(v, d[0], below(v->n));
    for (int n = below(4); n > 0; n--) put32(&v->stops, below(v->n)), v->n_stops++;
    for (int n = below(5); n > 0; n--, v->n_forms++)
        put32(&v->forms, "abcd "[below(5)]), put32(&v->forms, "abcd"[below(4)]),
            put32(&v->forms, below(2) ? 0 : 97);
    for (int i = 0; i < N_CHAT && below(4); i++) {
        const char *piece = (const char *[]){"", "a", "<s>", "%d %Y", "\xff\n"}[below(5)];
        chat_piece(v, piece, below(4096));
    }
    v->bos = below(v->n + 1) - 1, v->eos = below(v->n + 1) - 1, v->unk = below(v->n + 1) - 1;
    Buffer b = tokenizer_file(v);
    if (below(3) == 0) spoil(&b, 16, b.n, 1 + below(3));
    if (below(4) == 0) spoil(&b, 72, 96, 1);  // what it recommends
    set64(b.p + 8, hash64(b.p + 16, b.n - 16));
    return b;
}

// The sanitizers ask this before they look for leaks: a copy of this process that ends with an
// error frees nothing.
static bool is_copy;
int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void) { return is_copy; }

// What the program does with a command, in a process of its own, with part 4 or without it.
static Ran forged_run(const char *command, bool plain) {
    Ran r = {.command = command};
    fflush(stdout);
    pid_t pid = fork();
    if (!pid) {
        const char *argv[60] = {0};
        int argc = words_of(text("run %s -q -j 1", command), argv);
        if (!freopen("/dev/null", "r", stdin) || !freopen("stdout", "w", stdout) ||
            !freopen("stderr", "w", stderr)) _exit(99);
        alarm(patience(20));
        finished = true, folder[0] = 0, is_copy = true;
        Options o = {.mode = "generate", .steps = -1, .temperature = -1, .top_p = -1, .top_k = -1,
                     .min_p = -1, .repeat_penalty = -1, .repeat_last = 64, .layer = -1, .head = -1,
                     .at_once = 16, .logprobs = -1, .threads = 1};
        Model m;
        Tokenizer t = {0};
        use_fast_functions();
        if (plain) matmul = matmul_plain, attention = attention_plain;
        option_parse(&o, argc, (char **)(uintptr_t)argv);
        int mode = option_check(&o);
        load_model(&m, o.model);
        find_tokenizer(&t, o.tokenizer, &m);
        Output out = output_open(o.output);
        o.input = input_read(o.prompt_file, o.prompt, false);
        modes[mode].run(&o, &m, &t, &out);
        output_file(&out, out.n ? out.memory : "");
        _exit(unfinished);
    }
    r.status = status_of(pid);
    r.out = slurp("stdout"), r.err = slurp("stderr");
    return r;
}

// Each file goes through all commands until one finds it damaged, with part 4 and without it: the
// status and, if it is 0, the bytes are the same.
static void test_forger(void) {
    static const char *const all[] = {
        "-n 6 -s 1 -i 'abc 12 d'", "-n 4 -k 3 -s 2 -t 0.7 -i ab", "-m chat -n 5 -s 3 -i abc",
        "-m explain -n 2 -s 1 -i ab", "-m eval -i 'abc d'", "-m compress -f text -o small",
        "-m decompress -f small", "-S kv -n 3 -s 5", "-m decompress -f bad"};
    static const char *const models[] = {"forged.bin -z forged.tok", "nowhere.bin -z forged.tok",
                                         "forged.bin -z forged.tok", "endless.bin"};
    enum { N_COMMANDS = sizeof all / sizeof *all, COMPRESS_ = 5, SESSION = 7 };
    int n = getenv("FORGED") ? atoi(getenv("FORGED")) : 200, counts[2] = {0};
    uint64_t hash = 0;
    if (CUT(NO_CHAT) || CUT(NO_EXPLAIN) || CUT(NO_COMPRESS) || CUT(NO_SESSIONS)) return;
    if (getenv("SEED")) random_state = strtoull(getenv("SEED"), NULL, 10) << 32;
    make_models();
    save("text", "abc abd \xff abc d cab", 19);
    forged_run("endless.bin -S whole.kv -n 300 -s 1 -t 0 -i abc -c 2000", false);
    forged_run("endless.bin -m compress -f text -o whole", false);
    for (int i = 0; i < n; i++, empty_pool()) {
        int kind = i % 4;  // a model, a tokenizer, both, a session and a compressed file
        Buffer b = forged_model(), t = kind ? forged_tokenizer() : slurp("tiny.tok");
        Buffer kv = slurp("whole.kv"), bad = slurp("whole"), wrote = slurp("text");
        int parts[2] = {below(4), below(4)};
        // (A session's header has 56 bytes.)
        spoil(&kv, parts[0] & 1 ? 8 : 56, parts[0] & 2 ? 200 : kv.n, 1 + below(9));
        set64(kv.p + 48, hash64(kv.p, 48));
        spoil(&bad, parts[1] & 1 ? 24 : 48, parts[1] & 2 ? 49 : bad.n, 1 + below(2));
        set64(bad.p + 8, hash64(bad.p + 16, bad.n - 16));
        keep("forged.bin", &b), keep("forged.tok", &t), keep("bad", &bad);
        bool opens = true;
        for (int c = kind < 3 ? 0 : SESSION; c < (kind < 3 ? SESSION : N_COMMANDS) && opens; c++) {
            Ran r[2];
            for (int plain = 0; plain < 2; plain++) {
                keep("kv", &kv);
                r[plain] = forged_run(text("%s %s", models[kind], all[c]), plain);
                if (c == COMPRESS_) r[plain].out = slurp("small");
            }
            bool right = r[0].status == r[1].status && (r[0].status || equal(&r[0].out, &r[1].out));
            for (int k = 0; k < 2; k++)
                right &= r[k].status == 0 || (r[k].status == 1 && one_line(&r[k]));
            if (c == COMPRESS_ + 1) right &= r[0].status == 0 && equal(&r[0].out, &wrote);
            CHECK(right, "forged file %d: %s: status %d, %d, %.300s%.300s", i, r[0].command,
                  r[0].status, r[1].status, r[0].err.p, r[1].err.p);
            counts[r[0].status != 0]++;
            hash = mix64(hash + (uint64_t)r[0].status);
            if (r[0].status == 0) hash = mix64(hash + hash64(r[0].out.p, r[0].out.n));
            opens = kind == 3 || (c != 0 && c != COMPRESS_) || r[0].status == 0;
        }
    }
    if (getenv("FORGED")) printf("  %d files, %d commands done, %d refused, hash %016llx\n", n,
                                 counts[0], counts[1], (unsigned long long)hash);
}

// ==== 18. Real models, where they are ============================================================

static const char sample_text[] =
    "The sun is a star at the centre of the solar system. It is a hot ball of plasma, and it gives "
    "the Earth its light and warmth. Without it there would be no plants, no animals and no "
    "people.";

static void test_real_model(void) {
    if (access(at_home("model.bin"), R_OK)) {
        skip(8, "the default model, as there is no model.bin: make model.bin && make test");
        return;
    }
    if (no_program()) return;
    setenv("M", at_home("model.bin"), 1), setenv("X", sample_text, 1);
    prints("the capital of France is Paris", "The capital of France is Paris.",
           "run $M -i 'The capital of France is' -t 0 -n 8 -q | head -c 31");
    prints("the model passes its check", "ok\n", "run $M -m check -q");
    prints("it predicts an English text in less than a bit per byte", "bits_per_byte: 0.",
           "run $M -m eval -i \"$X\" -q | head -c 17");
    prints("tokenize prints its ids", "19556 28 905 17 657 506 216 34 32 34 38\n",
           "printf %s \"Hello, world! It's 2026\" | run $M -m tokenize -i -");
    static const char *const commands[] = {
        "-m logits -i '504 3575 282 4649 314 7042 30 198 198 504'",
        "-i 'The capital of France is' -n 12 -s 1 --receipt -q 2>&1", "-m compress -i \"$X\" -q"};
    for (int i = 0; i < 3; i++)
        for (int threads = 2; threads < 4; threads++)
            same(text("%d threads print what one does", threads),
                 text("run $M -j %d %s", threads, commands[i]),
                 text("run $M -j 1 %s", commands[i]));
    same("a text comes back", "run $M -m compress -i \"$X\" | run $M -m decompress",
         "printf %s \"$X\"");
}

static void test_stories(void) {
    static const char *const stories[][2] = {
        {"greedy-n200", "-t 0 -s 1 -n 200"}, {"t1.0-p0.9-s42-n200", "-t 1 -p 0.9 -s 42 -n 200"},
        {"t0.8-p1.0-s7-n120-one-day-tom", "-t 0.8 -p 1 -s 7 -n 120 -i 'One day, Tom'"}};
    setenv("L", at_home("../shared/llama2c"), 1);
    bool here = !access(at_home("../shared/llama2c"), R_OK) && !no_program();
    if (!here) skip(3, "llama2.c's texts, as ../shared/llama2c is not here: ./test_all models");
    for (int i = 0; i < 3 && here; i++)
        same("llama2.c's program prints the same", text("cat \"$L/%s.txt\"", stories[i][0]),
             text("run \"$L/stories260K.bin\" -z \"$L/tok512.bin\" %s", stories[i][1]));
}

// Logits of the families' small models, against those of Hugging Face's transformers.
static void test_tiny_families(void) {
    const char *reference_ = at_home("../shared/reference");
    const char *models = getenv("MODELS") && !no_program() ? getenv("MODELS") : NULL;
    Ran names = SH("cd '%s' && ls -d tiny-* families/tiny-* | "
                   "grep -v 'reward\\|lfm2\\|qwen3_5'", reference_);
    if (!models || names.status) {
        skip(1, "logits of families, from ../shared: MODELS=folder-of-exports ./test_all models");
        return;
    }
    for (char *name = strtok((char *)names.out.p, "\n"); name; name = strtok(NULL, "\n")) {
        const char *from = text("%s/%s", reference_, name), *last_part = strrchr(name, '/');
        Buffer npy = slurp(text("%s/expected_logits.npy", from));
        Ran r = SH("run '%s/%s-f32.bin' -m logits -i \"$(tr -d '\\n,' <%s/expected.json | "
                   "sed 's/.*\"ids\": *\\[\\([0-9 ]*\\).*/\\1/')\"", models,
                   last_part ? last_part + 1 : name, from);
        double worst = r.out.n > 9999 && r.out.n < npy.n ? 0 : 1e9;
        for (size_t at = 0; at < r.out.n; at += 4) {
            float x, y;
            memcpy(&x, r.out.p + at, 4), memcpy(&y, npy.p + npy.n - r.out.n + at, 4);
            worst = worse(worst, fabs((double)x - (double)y));
        }
        CHECK(worst < 1e-3, "%s: off by %g: %s", name, worst, r.err.p);
    }
}

static void test_models(void) {
    test_real_model();
    test_stories();
    test_tiny_families();
}

// ==== 19. The README =============================================================================

// Whether a command said what is shown, where a line of "..." stands for any number of lines.
static bool is_shown(const char *said, const char *shown) {
    for (size_t n; *shown; said += n, shown += n) {
        n = strcspn(shown, "\n") + 1;
        if (!strncmp(shown, "...\n", 4)) {
            while (!is_shown(said, shown + n) && *said) said += strcspn(said, "\n") + 1;
            return is_shown(said, shown + n);
        }
        if (strncmp(said, shown, n)) return false;
    }
    return !*said;
}

// Every block of README.md that is marked as sh works, and prints what the block of text behind it
// shows.
static void test_readme(void) {
    static const char start_[] = "\n```sh\n", end_[] = "\n```\n", text_[] = "\n```text\n";
    if (access(at_home("model.bin"), R_OK) || getenv("PATIENCE")) {
        skip(1, "the commands of README.md, as that takes model.bin: make model.bin && make test");
        return;
    }
    if (no_program()) return;
    Buffer page = slurp(at_home("README.md"));
    int words = 0, blocks = 0;
    for (char *p = (char *)page.p; *p; p++) words += *p > ' ' && p[1] <= ' ';
    CHECK(words > 1000 && words <= 3000, "it has %d words, at most 3000", words);
    SH("mkdir readme; cd readme; ln -s '%s' run; for file in model.bin tokenizer.bin LICENSE; do "
       "ln -s '%s'/$file $file; done", program(), home);
    for (char *at = (char *)page.p, *end; (at = strstr(at, start_)) != NULL; at = end, blocks++) {
        char *command = at + strlen(start_), *shown = NULL;
        end = strstr(command, end_);
        if (!end) break;
        *end = 0, end += strlen(end_);
        if (!strncmp(end, text_, strlen(text_))) {
            shown = end + strlen(text_);
            end = strstr(shown, end_) + 1;
            *end++ = 0;
        }
        Ran r = SH("cd readme; exec 2>&1; %s", command);
        CHECK(r.status == 0 && (!shown || is_shown((char *)r.out.p, shown)),
              "README.md: %s\nprints, with status %d: %s", command, r.status, r.out.p);
    }
    CHECK(blocks > 9, "%d blocks of commands were run", blocks);
    SH("rm -r readme");
}

// ==== 20. export.py ==============================================================================

// A small model as a Hugging Face folder or a GGUF. A case changes C (config.json), W (tensors), F
// (other files), A (arguments) or S (what is exported). It says "same" if the checkpoint is that of
// R (a config.json) with the unchanged rest, else "other", or the error; or it sets `seen` itself.
static const char *const export_frame[] = {
    "import contextlib, io, json, os, shutil, sys, types",
    "sys.path.insert(0, sys.argv[1])",
    "import gguf, numpy as np, export",
    "os.fsync = lambda file: None     # saves time",
    "from tokenizers.pre_tokenizers import ByteLevel",
    "rng = np.random.default_rng(1)",
    "C0 = dict(model_type='llama', hidden_size=256, intermediate_size=256, vocab_size=258,",
    "          num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, rope_theta=1e4,",
    "          max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False)",
    "words = [*sorted(ByteLevel.alphabet()), 'ab', '<s>']",
    "start = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)",
    "start.update(id=257, content='<s>', special=True)",
    "F0 = {'tokenizer.json': {'version': '1.0', 'added_tokens': [start],",
    "      'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False,",
    "                        'trim_offsets': True},",
    "      'model': {'type': 'BPE', 'vocab': {word: i for i, word in enumerate(words[:257])},",
    "                'merges': ['a b']}}}",
    "tensors = export.weights(export.read_config('', C0, ''))",
    "W0 = {t.hugging_face: rng.standard_normal((t.rows, t.cols)[t.dtype == 0:], 'f4') / 8",
    "      for t in tensors}",
    "embedding, wq = 'model.embed_tokens.weight', 'model.layers.0.self_attn.q_proj.weight'",
    "vocabs = export.folder_vocab, export.gguf_vocab     # used where a case says so",
    "export.folder_vocab = export.gguf_vocab = lambda *_: None",
    "kinds = {'F4': 'F32', 'F2': 'F16', 'I4': 'I32', 'U1': 'F8_E4M3', 'U2': 'BF16'}",
    "def write_safetensors(path, tensors):",
    "    head, data = {}, b''",
    "    for name, a in tensors.items():",
    "        end = len(data) + a.nbytes",
    "        head[name] = dict(dtype=kinds[a.dtype.str[1:].upper()], shape=a.shape,",
    "                          data_offsets=[len(data), end])",
    "        data += a.tobytes()",
    "    head = json.dumps(head).encode()",
    "    open(path, 'wb').write(len(head).to_bytes(8, 'little') + head + data)",
    "def write_folder(config, tensors, files, path='model'):",
    "    shutil.rmtree(path, ignore_errors=True)",
    "    os.makedirs(path)",
    "    files = {'config.json': config, 'model.safetensors': tensors, **files}",
    "    for name, a in files.items():",
    "        if a is None: continue",
    "        if name.endswith('.safetensors'): write_safetensors(f'{path}/{name}', a)",
    "        else: open(f'{path}/{name}', 'w').write(json.dumps(a))",
    "def gguf_names(arch, layers=1):",
    "    source = export.GGUF.__new__(export.GGUF)",
    "    (number,) = [n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]",
    "    source.names = gguf.get_tensor_name_map(number, layers)",
    "    return source.named",
    "named = gguf_names('llama')",
    "def write_gguf(path, types={}, keys={}, order=gguf.GGUFEndian.LITTLE, part=None,",
    "               arch='llama'):",
    "    w = gguf.GGUFWriter(path, arch, endianess=order)",
    "    for key, value in {'block_count': 1, 'context_length': 64, 'embedding_length': 256,",
    "                       'feed_forward_length': 256, 'attention.head_count': 4,",
    "                       'attention.head_count_kv': 2, **keys}.items():",
    "        add = w.add_array if isinstance(value, list) else w.add_uint32",
    "        add('llama.' + key, value)",
    "    w.add_name('model'), w.add_layer_norm_rms_eps(1e-5)",
    "    w.add_tokenizer_model('llama'), w.add_token_types([2, 1] + [6] * 256)",
    "    w.add_token_list(['<unk>', '\\u2581'] + [f'<0x{i:02X}>' for i in range(256)])",
    "    w.add_token_scores([0.0] * 258)",
    "    if part is not None: w.add_uint16('split.count', 2)",
    "    for i, t in enumerate(tensors):",
    "        if part in (0, 1) and i % 2 != part: continue",
    "        a, kind = W0[t.hugging_face], types.get(t.key[0], 'F32')",
    "        if kind[-1] in 'KL':    # which the library does not make",
    "            n, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]",
    "            a = rng.integers(0, 256, (t.rows, t.cols // n, size), np.uint8)",
    "            a[..., :4] = a[..., -4:] = np.full(2, 0.002, '<f2').view(np.uint8)",
    "            a = a.reshape(t.rows, -1)",
    "        elif kind != 'F32': a = gguf.quantize(a, gguf.GGMLQuantizationType[kind])",
    "        w.add_tensor(named(t.hugging_face), a, raw_dtype=gguf.GGMLQuantizationType[kind])",
    "    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()",
    "    w.close()",
    "class Numbers(export.Source):      # a model of random numbers, in Hugging Face's order",
    "    vocab, halves = None, True",
    "    def read(self, key, index): return self.numbers[key][index]",
    "def gguf_of(arch, family, pairs, **C):      # as llama.cpp's converter writes it",
    "    C = {**C0, **dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4), **C}",
    "    C = {key: value for key, value in C.items() if value is not None}",
    "    if 'num_experts' in C: C.setdefault('moe_intermediate_size', 96)",
    "    source, name = Numbers(), gguf_names(arch, 4)",
    "    biases = set(C.pop('biases', ()))",
    "    c = source.config = export.read_config('', {**C, 'model_type': family}, 'x', biases)",
    "    c.names = {ours: n for ours, n in c.names.items()",
    "               if name(n if ours in export.OUTER else 'model.layers.0.' + n)}",
    "    source.made, wanted = {'router_bias'} if c.n_shared else set(), export.weights(c)",
    "    source.numbers, source.tensors, groups, put = {}, {}, {}, {}",
    "    for t in wanted:",
    "        for key in t.keys():",
    "            a = rng.standard_normal((t.rows, t.cols), 'f4') / 8",
    "            if t.key[0] == 'router' and c.n_shared:",
    "                a[-c.n_shared:] = a[-1] if family == 'qwen2_moe' else 0",
    "            if t.key[0] == 'choice_bias': a[0, c.n_experts - c.n_shared:] = 0",
    "            source.numbers[key], source.tensors[key] = a, export.Raw('', '', 'F32', 0, 0, 0)",
    "        if t.key[0] not in source.made:",
    "            groups.setdefault(name(t.hugging_face), []).append(t)",
    "    for label, tensors in groups.items():",
    "        (key, layer), n, parts = tensors[0].key, c.n_experts - c.n_shared, []",
    "        for t in tensors:",
    "            many = [source.numbers[k][0 if t.rows == 1 else slice(None)] for k in t.keys()]",
    "            if t.key[0] in ('wq', 'wk', 'bq', 'bk') and pairs:",
    "                heads = many[0].reshape(-1, 2, c.head_dim // 2, t.cols if t.rows > 1 else 1)",
    "                many[0] = heads.swapaxes(1, 2).reshape(many[0].shape)",
    "            if len(many) > 1 and c.n_shared:",
    "                put[label.replace('exps', 'shexp')] = np.concatenate(many[n:], int(",
    "                    t.key[0] == 'w_down'))",
    "            parts.append(np.stack(many[:n]) if len(many) > 1 else many[0])",
    "        if key == 'choice_bias': parts[0] = parts[0][:n]",
    "        if key == 'router': parts[0], gate = parts[0][:n], parts[0][-1]",
    "        if key == 'router' and family == 'qwen2_moe':",
    "            put[label.replace('.weight', '_shexp.weight')] = gate",
    "        put[label] = np.concatenate(parts) if len(parts) > 1 else parts[0]",
    "    w = gguf.GGUFWriter('family.gguf', arch)",
    "    keys = {theirs: C[ours] for ours, theirs in export.GGUF_KEYS.items()",
    "            if ours in C}",
    "    keys['rope.dimension_count'] = c.rotary",
    "    for key, value in keys.items():",
    "        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32}[type(value)]",
    "        add(f'{arch}.{key}', value)",
    "    w.add_name('x')",
    "    for label, a in put.items(): w.add_tensor(label, np.ascontiguousarray(a))",
    "    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()",
    "    w.close()",
    "    with open('family.bin', 'x+b' if not os.path.exists('family.bin') else 'r+b') as file:",
    "        file.truncate(0)",
    "        export.write_checkpoint(file, source, export.F32, 0)",
    "    found = run('family.gguf', dtype='f32')",
    "    same = found == open('family.bin', 'rb').read()",
    "    return '' if same else f'{arch}: ' + (found if isinstance(found, str) else 'other')",
    "def run(source, **args):",
    "    args = {'source': source, 'model': 'export.bin', 'dtype': None, 'tokenizer': None,",
    "            'vocab': None, 'lora': None, 'context': None, **args}",
    "    try: export.export(types.SimpleNamespace(**args))",
    "    except Exception as error: return f'{type(error).__name__}: {error}'",
    "    return open(args['model'], 'rb').read()",
    "many = dict(token_embedding='Q8_0', wq='Q4_K', wk='Q5_0', wv='Q4_0', wo='Q4_1',",
    "            w_down='F16', w_gate='IQ4_NL', w_up='MXFP4', classifier='Q6_K')",
    "def stored(path, types):    # a GGUF's dtypes, and if the numbers are right",
    "    write_gguf(path, types)",
    "    source, out = export.GGUF(path), []",
    "    all_of_it = export.weights(source.config)",
    "    export.choose_dtypes(all_of_it, source)",
    "    for t in [t for t in all_of_it if t.key[0] in types]:",
    "        a, wanted = export.convert(t, source, 0, t.rows), source.read(t.key, slice(t.rows))",
    "        if t.dtype in export.QUANTIZE:",
    "            q, scale, minimum = export.split_weights(t.dtype, a)",
    "            a = (q * scale + minimum).reshape(wanted.shape)",
    "        error = np.square(a - wanted).sum() / np.square(wanted).sum()",
    "        (name,) = [name for name, dtype in export.DTYPES.items() if dtype == t.dtype]",
    "        out.append(name + ('' if error < 5e-7 else '~' if error < 1e-4 else ' wrong'))",
    "    return ' '.join(out)",
    "def loaded(C, W):   # the dtype of wq, its numbers in the source, and in the checkpoint",
    "    write_folder(C, W, F0)",
    "    source = export.HuggingFace('model')",
    "    all_of_it = export.weights(source.config)",
    "    export.choose_dtypes(all_of_it, source)",
    "    (t,), source.halves = [t for t in all_of_it if t.hugging_face == wq], False",
    "    (name,) = [name for name, dtype in export.DTYPES.items() if dtype == t.dtype]",
    "    q, scale, minimum = export.split_weights(t.dtype, export.convert(t, source, 0, 256))",
    "    return name, source.read(t.key, slice(256)), (q * scale + minimum).reshape(256, 256)",
    "def four_bits(C, W, method, group):     # q (in, out), zero and scale (groups, out)",
    "    q, zero = rng.integers(0, 16, (256, 256)), rng.integers(0, 15, (4, 256))",
    "    scale = (rng.random((4, 256)) / 64).astype('<f2')",
    "    def packed(a, order):",
    "        words = sum(a[i::8] << 4 * at for at, i in enumerate(order))",
    "        return words.astype('<u4').view('<i4')",
    "    base, order = wq[:-6], range(8) if method == 'gptq' else (0, 2, 4, 6, 1, 3, 5, 7)",
    "    del W[wq]",
    "    W[base + 'qweight'] = (packed(q, order) if method == 'gptq' else",
    "                           packed(q.T, order).T.copy())",
    "    W[base + 'qzeros'], W[base + 'scales'] = packed(zero.T, order).T.copy(), scale",
    "    if method == 'gptq': W[base + 'g_idx'] = group.astype('<i4')",
    "    C['quantization_config'] = {'quant_method': method, 'bits': 4}",
    "    if method == 'awq': C['quantization_config']['version'] = 'gemm'",
    "    wanted = (q - (zero + (method == 'gptq'))[group]) * scale[group].astype('f4')",
    "    name, read, ours = loaded(C, W)",
    "    return name, str(np.array_equal(read, wanted.T)), str(abs(ours - read).max() < 1e-3)",
    "def eight_bits(C, W, scales, suffix, **q):",
    "    bits = rng.integers(0, 127, (256, 256)).astype('u1')",
    "    W[wq], W[wq + suffix], C['quantization_config'] = bits, scales.astype('f4'), q",
    "    e, m = bits >> 3, bits & 7",
    "    value = np.where(e, (8 + m) * 2.0 ** (e - 10.0), m * 2.0 ** -9)",
    "    name, read, ours = loaded(C, W)",
    "    wanted = value * np.kron(scales, np.ones(np.array(bits.shape) // scales.shape))",
    "    return name, str(np.allclose(read, wanted, 1e-6)), str(abs(ours - read).max() < 2)",
    "def lora(tensor, end='safetensors', **config):",
    "    config.update(peft_type='LORA', lora_alpha=2)",
    "    tensor = 'base_model.model.' + tensor",
    "    write_folder(config, {tensor: np.ones((2, 256), 'f4')}, {}, 'lora')",
    "    os.rename('lora/config.json', 'lora/adapter_config.json')",
    "    os.rename('lora/model.safetensors', 'lora/adapter_model.' + end)",
    "    return {'lora': 'lora'}",
    "def tokenizer(F, C=C0):",
    "    write_folder(C, {}, F)",
    "    try: return vocabs[0](export.Path('model'), C, 258)",
    "    except export.ExportError as error: return str(error)",
    "def case(code):",
    "    J = json.loads(json.dumps(F0['tokenizer.json']))",
    "    g = dict(globals(), C=dict(C0), W=dict(W0), F={'tokenizer.json': J}, J=J, R=dict(C0),",
    "             A={}, S='model')",
    "    g['seen'] = None",
    "    log = io.StringIO()",
    "    with contextlib.redirect_stderr(log):",
    "        exec(code, g)",
    "        if g['seen'] is None:",
    "            write_folder(g['R'], W0, F0)",
    "            wanted = run('model')",
    "            write_folder(g['C'], g['W'], g['F'])",
    "            found = run(g['S'], **g['A'])",
    "            g['seen'] = (found if isinstance(found, str) else",
    "                         'same' if found == wanted else 'other')",
    "    if isinstance(g['seen'], tuple): g['seen'] = ' '.join(g['seen'])",
    "    notes = [x for x in log.getvalue().splitlines() if 'run.c' in x or 'adapter' in x]",
    "    print(' '.join([str(g['seen']), *notes]).replace('\\n', ' '))",
};

static const struct { const char *what, *code, *says; } exports[] = {
    {"a folder gives one checkpoint", "", "same"},
    {"the matrices of a GGUF stay what they are",
     "seen = stored('k.gguf', many)", "q8 q8~ q4a q8 q4 q4a q8 q8 q8~"},
    {"halves are kept where most numbers are not quantized",
     "seen = stored('h.gguf', dict(wq='Q8_0', wk='F16', wv='BF16'))", "q8 f32 bf16"},
    {"a GGUF of many types can be run",
     "write_gguf('mixed.gguf', many)\n"
     "export.gguf_vocab = vocabs[1]\n"
     "seen = str(type(run('mixed.gguf', model='mixed.bin')))\n"
     "export.gguf_vocab = lambda *_: None", "bytes"},
    {"a GGUF is its family's folder, whatever it calls its tensors and settings",
     "e = dict(num_experts=5, num_experts_per_tok=2)\n"
     "ln = dict(layer_norm_eps=1e-5, rms_norm_eps=None)\n"
     "soft = dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0, sliding_window=9,\n"
     "            query_pre_attn_scalar=16, head_dim=16, tie_word_embeddings=True)\n"
     "more = dict(attention_multiplier=0.3, embedding_multiplier=6.0, residual_multiplier=0.4,\n"
     "            logits_scaling=3.0)\n"
     "shared = dict(n_shared_experts=2, first_k_dense_replace=1, moe_intermediate_size=32)\n"
     "out = [gguf_of(*row[:3], **row[3]) for row in (\n"
     "    ('llama', 'mixtral', 1, e), ('gemma2', 'gemma2', 0, soft), ('phi3', 'phi3', 0, {}),\n"
     "    ('olmo2', 'olmo2', 0, {}), ('olmo2', 'olmo3', 0, dict(sliding_window=9)),\n"
     "    ('granite', 'granite', 1, more), ('granitemoe', 'granitemoe', 1, {**more, **e}),\n"
     "    ('qwen2moe', 'qwen2_moe', 0, {**e, 'shared_expert_intermediate_size': 192}),\n"
     "    ('qwen3moe', 'qwen3_moe', 0, {**e, 'norm_topk_prob': True}), ('olmoe', 'olmoe', 0, e),\n"
     "    ('smollm3', 'smollm3', 1, {}), ('ernie4_5', 'ernie4_5', 0, {}),\n"
     "    ('glm4', 'glm4', 0, {}), ('seed_oss', 'seed_oss', 0, {}),\n"
     "    ('ernie4_5-moe', 'ernie4_5_moe', 0, {**e, **shared}),\n"
     "    ('glm4moe', 'glm4_moe', 0, {**e, **shared, 'use_qk_norm': True, 'norm_topk_prob':\n"
     "     True, 'routed_scaling_factor': 1.5}), ('hunyuan-dense', 'hunyuan_v1_dense', 0, {}),\n"
     "    ('exaone4', 'exaone4', 0, dict(sliding_window=9)), ('mistral3', 'ministral3', 1, {}),\n"
     "    ('gpt2', 'gpt2', 0, {**ln, 'tie_word_embeddings': True, 'num_key_value_heads': 4}),\n"
     "    ('gpt-oss', 'gpt_oss', 0, {**e, 'biases': ('bq', 'bk', 'bv', 'bo'), 'sliding_window':\n"
     "     9}), ('starcoder2', 'starcoder2', 0, {**ln, 'use_bias': False}),\n"
     "    ('gptneox', 'gpt_neox', 0, {**ln, 'attention_bias': False, 'mlp_bias': False,\n"
     "     'num_key_value_heads': 4, 'use_parallel_residual': False}))]\n"
     "seen = f'{out.count(str())} of {len(out)} same; ' + '; '.join(filter(None, out))",
     "23 of 23 same"},
    {"an architecture of GGUFs that is not known",
     "write_gguf('x.gguf', arch='rwkv7')\n"
     "S = 'x.gguf'", "architecture 'rwkv7' is not supported"},
    {"GPT-OSS's MXFP4",
     "blocks, scales = (rng.integers(*r, n, 'u1') for *r, n in ((0, 256, (2, 4, 2, 16)),\n"
     "                                                          (110, 130, (2, 4, 2))))\n"
     "write_safetensors('mx', {'x_blocks': blocks, 'x_scales': scales})\n"
     "raw = export.join_packed('', export.open_safetensors([export.Path('mx')]), {\n"
     "    'quant_method': 'mxfp4'})['x']\n"
     "raw = raw._replace(shape=(4, 64), offset=raw.offset + 128, n_bytes=128)    # the second\n"
     "table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])\n"
     "wanted = table[np.stack([blocks & 15, blocks >> 4], -1)].reshape(2, 4, 2, 32)[1]\n"
     "wanted = np.ldexp(wanted, scales[1, ..., None].astype(int) - 127).reshape(4, 64)\n"
     "q, scale, _ = export.split_weights(3, export.as_blocks('MXFP4', 3, export.raw_bytes(\n"
     "    raw, slice(None))))\n"
     "seen = str([np.array_equal(a, wanted) for a in (export.read_raw(raw), (q * scale).reshape(\n"
     "    4, 64))])", "[True, True]"},
    {"what takes more than its source says so",
     "write_gguf('x.gguf', dict.fromkeys(many, 'MXFP4'))\n"
     "seen = str(len(run('x.gguf')))", "run.c has no dtype like MXFP4: the matrices take"},
    {"a GGUF in parts is read",
     "write_gguf('s.gguf')\n"
     "wanted = run('s.gguf')\n"
     "write_gguf('s-00001-of-00002.gguf', part=0), write_gguf('s-00002-of-00002.gguf', part=1)\n"
     "seen = 'same' if run('s-00002-of-00002.gguf') == wanted else 'other'", "same"},
    {"a part of a GGUF is missing",
     "write_gguf('t-00001-of-00002.gguf', part=0)\n"
     "S = 't-00001-of-00002.gguf'", "t-00002-of-00002.gguf"},
    {"a part of a GGUF has another name",
     "write_gguf('part.gguf', part=0)\n"
     "S = 'part.gguf'", "part.gguf is one of 2 files"},
    {"a big-endian GGUF",
     "write_gguf('big.gguf', order=gguf.GGUFEndian.BIG)\n"
     "S = 'big.gguf'", "big.gguf is big-endian: convert it"},
    {"a number for each layer, the same in all",
     "write_gguf('s.gguf', keys={'attention.head_count_kv': [2]})\n"
     "wanted = run('s.gguf')\n"
     "write_gguf('s.gguf')\n"
     "seen = 'same' if run('s.gguf') == wanted else 'other'", "same"},
    {"a number for each layer",
     "write_gguf('a.gguf', keys={'attention.head_count_kv': [2, 4]})\n"
     "S = 'a.gguf'", "attention.head_count_kv differs from layer to layer"},
    {"an unknown key of a GGUF",
     "write_gguf('a.gguf', keys={'new_thing': 2})\n"
     "S = 'a.gguf'", "llama.new_thing = 2 is not understood"},
    {"an index left over beside a single file",
     "F['model.safetensors.index.json'] = {'weight_map': {embedding: 'gone.safetensors'}}", "same"},
    {"a stale copy in another part",
     "files = {**dict.fromkeys(W, 'a.safetensors'), wq: 'b.safetensors'}\n"
     "F['model.safetensors.index.json'] = {'weight_map': files}\n"
     "F.update({'a.safetensors': {**W, wq: 0 * W[wq]}, 'b.safetensors': {wq: W[wq]}})\n"
     "W = None", "same"},
    {"a tensor in two parts that no index has",
     "F.update({'model.safetensors.index.json': {'weight_map': {'x': 'a.safetensors', embedding:\n"
     "           'b.safetensors'}}, 'a.safetensors': W, 'b.safetensors': W})\n"
     "W = None", "is in another file, too"},
    {"each matrix keeps its own dtype",
     "W[embedding] = (W[embedding].view('u4') >> 16).astype('<u2')\n"
     "write_folder(C, W, F)\n"
     "s, w = export.HuggingFace('model'), export.weights(export.read_config('', C, ''))\n"
     "export.choose_dtypes(w, s)\n"
     "seen = str([t.dtype for t in w if t.dtype != export.ROWS])", "[2, 1, 1, 1, 1, 1, 1, 1, 1]"},
    {"tied, and only lm_head is there",
     "C['tie_word_embeddings'] = True\n"
     "del W['lm_head.weight']\n"
     "write_folder(C, W, F)\n"
     "wanted = run('model')\n"
     "W['lm_head.weight'] = W.pop(embedding)\n"
     "write_folder(C, W, F)\n"
     "seen = 'same' if run('model') == wanted else 'other'", "same"},
    {"names after torch.compile", "W = {'_orig_mod.' + n: a for n, a in W.items()}", "same"},
    {"names of the inner model", "W = {n.replace('model.', ''): a for n, a in W.items()}", "same"},
    {"a name twice", "W['_orig_mod.' + wq] = W[wq]", "q_proj.weight is there twice"},
    {"biases of zeros", "W[wq[:-6] + 'bias'] = np.zeros(256, 'f4')", "same"},
    {"biases", "W[wq[:-6] + 'bias'] = np.ones(256, 'f4')", "q_proj.bias"},
    {"GPTQ", "seen = four_bits(C, W, 'gptq', np.arange(256) // 64)", "q4a True True"},
    {"GPTQ in act-order",
     "seen = four_bits(C, W, 'gptq', rng.permutation(256) // 64)", "q8 True True"},
    {"AWQ", "seen = four_bits(C, W, 'awq', np.arange(256) // 64)", "q4a True True"},
    {"8-bit floats with scales of squares",
     "seen = eight_bits(C, W, rng.random((2, 2)), '_scale_inv', quant_method='fp8',\n"
     "                  weight_block_size=[128, 128])", "q8 True True"},
    {"8-bit floats with scales of rows",
     "seen = eight_bits(C, W, rng.random((256, 1)), '_scale', quant_method='fbgemm_fp8')",
     "q8 True True"},
    {"another quantization",
     "C['quantization_config'] = {'quant_method': 'bitsandbytes'}",
     "quant_method = bitsandbytes is not supported"},
    {"GPTQ of 8 bits",
     "C['quantization_config'] = {'quant_method': 'gptq', 'bits': 8}",
     "gptq of 8 bits, gemm, is not supported"},
    {"rope_scaling beside rope_parameters counts",
     "C.update(rope_parameters={'rope_type': 'linear', 'factor': 4.0}, rope_scaling={\n"
     "         'rope_type': 'linear', 'factor': 2.0})\n"
     "R['rope_scaling'] = C['rope_scaling']", "same"},
    {"yarn's length beside its settings counts",
     "C.update(rope_scaling={'rope_type': 'yarn', 'factor': 2.0},\n"
     "         original_max_position_embeddings=32)\n"
     "R['rope_scaling'] = {**C['rope_scaling'], 'original_max_position_embeddings': 32}", "same"},
    {"flat settings for two kinds of layers",
     "C.update(model_type='gemma3_text', rope_parameters={'rope_type': 'default'})",
     "rope_parameters has rope_type, and not"},
    {"an unknown setting of RoPE",
     "C['rope_scaling'] = {'type': 'default', 'mrope_section': [1, 2]}",
     "mrope_section = [1, 2] is not understood"},
    {"Mistral's window, unless it is null",
     "C['model_type'] = 'mistral'\n"
     "R.update(model_type='mistral', sliding_window=4096)", "same"},
    {"no window",
     "C.update(model_type='mistral', sliding_window=None)\n"
     "R.update(model_type='mistral', sliding_window=4096)", "other"},
    {"a setting that is not understood",
     "C['logit_scale'] = 0.5", "logit_scale = 0.5 is not understood"},
    {"settings that change nothing",
     "C.update(logit_scale=None, torch_dtype='float16', use_cache=True, attention_dropout=0.1)",
     "same"},
    {"a setting is missing", "del C['vocab_size']", "its config.json has no vocab_size"},
    {"a setting of another kind",
     "C['hidden_size'] = '256'", "hidden_size = 256 in its config.json"},
    {"what is recommended for sampling",
     "F['generation_config.json'] = {'do_sample': False, 'temperature': 0.6, 'top_k': 20,\n"
     "                               'min_p': 0.05, 'repetition_penalty': 1.1}\n"
     "write_folder(C, W, F)\n"
     "seen = str(vocabs[0](export.Path('model'), C, 258).sampling)", "(0, -1.0, 20, 0.05, 1.1)"},
    {"special_tokens_map.json",
     "F['special_tokens_map.json'] = {'bos_token': '<s>'}\n"
     "write_folder(C, W, F)\n"
     "seen = str(vocabs[0](export.Path('model'), C, 258).bos)", "257"},
    {"an unknown key of a tokenizer", "J['new_thing'] = 1\nseen = tokenizer(F)", "new_thing: 1"},
    {"a suffix of words",
     "J['model']['end_of_word_suffix'] = '</w>'\n"
     "seen = tokenizer(F)", "end_of_word_suffix: \"</w>\""},
    {"a normalizer that is not known",
     "J['normalizer'] = {'type': 'NFKC'}\nseen = tokenizer(F)", "normalizer {\"type\": \"NFKC\"}"},
    {"another pattern of Replace",
     "J['normalizer'] = {'type': 'Replace', 'pattern': {'Regex': ' +'}, 'content': '_'}\n"
     "seen = tokenizer(F)", "the pattern of Replace has Regex: \" +\""},
    {"neither a normalizer nor a pre-tokenizer",
     "J['pre_tokenizer'] = None\nseen = tokenizer(F)",
     "neither its normalizer nor its pre_tokenizer"},
    {"a pre-tokenizer that is not known",
     "J['pre_tokenizer'] = {'type': 'WhitespaceSplit'}\nseen = tokenizer(F)", "WhitespaceSplit"},
    {"a pattern that cannot be compiled",
     "J['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [{'type': 'Split', 'pattern': {\n"
     "    'Regex': r'\\bx+'}, 'behavior': 'Isolated', 'invert': False}, J['pre_tokenizer']]}\n"
     "seen = tokenizer(F)", "the pattern \\bx+ cannot be compiled: this escape (at character 2)"},
    {"merges that are no splits of a token",
     "J['model']['merges'] = ['a c']\nseen = tokenizer(F)", "`ac` out of vocabulary"},
    {"stored padding and truncation are ignored",
     "J.update(truncation={'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst',\n"
     "                     'stride': 0}, padding={'strategy': {'Fixed': 9}, 'direction': 'Left',\n"
     "         'pad_to_multiple_of': None, 'pad_id': 1, 'pad_type_id': 0, 'pad_token': 'x'})\n"
     "seen = str(len(tokenizer(F).encode('a b c d')))", "7"},
    {"the post-processor says what begins a text",
     "J['post_processor'] = {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id':\n"
     "    '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}], 'pair': [{'Sequence':\n"
     "    {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],\n"
     "    'special_tokens': {'<s>': {'id': '<s>', 'ids': [257], 'tokens': ['<s>']}}}\n"
     "F['tokenizer_config.json'] = {'add_bos_token': False, 'bos_token': 'a'}\n"
     "C['bos_token_id'] = 3\n"
     "seen = str(tokenizer(F, C).encode('a'))", "[257, 64]"},
    {"and not add_bos_token",
     "F['tokenizer_config.json'] = {'add_bos_token': True, 'bos_token': '<s>'}\n"
     "seen = str(tokenizer(F).encode('a'))", "[64]"},
    {"what differs from the library is found",
     "J['pre_tokenizer']['use_regex'] = True\n"
     "export.GPT2, gpt2 = export.GPT2.replace('L}+', 'L}'), export.GPT2\n"
     "seen = tokenizer(F)\n"
     "export.GPT2 = gpt2", "would give"},
    {"a tensor that begins within the header",
     "write_folder(C, W, F)\n"
     "raw = open('model/model.safetensors', 'rb').read()\n"
     "n = int.from_bytes(raw[:8], 'little')\n"
     "head = json.loads(raw[8:8 + n])\n"
     "size = W[wq].nbytes\n"
     "head[wq]['data_offsets'] = [-size, 0]\n"
     "head = json.dumps(head).ljust(size).encode()\n"
     "open('model/model.safetensors', 'wb').write(len(head).to_bytes(8, 'little') + head +\n"
     "                                            raw[8 + n:])\n"
     "seen = run('model')", "within the header"},
    {"an array of 2^62 in a short GGUF",
     "open('a.gguf', 'wb').write(b'GGUF' + b''.join(n.to_bytes(size, 'little') for n, size in (\n"
     "    (3, 4), (0, 8), (1, 8), (1, 8), (97, 1), (9, 4), (0, 4), (1 << 62, 8))))\n"
     "S = 'a.gguf'", "a.gguf is truncated or damaged"},
    {"a token of number 10^9",
     "J['model']['vocab']['x'] = 10 ** 9\nseen = tokenizer(F)", "a token of number 1000000000"},
    {"a token of 65,536 bytes",
     "J['added_tokens'] += [{**start, 'id': 258, 'content': 'y' * 65536}]\n"
     "write_folder(C, {}, F)\n"
     "try: seen = export.tokenizer_bytes(vocabs[0](export.Path('model'), C, 259))\n"
     "except export.ExportError as error: seen = str(error)", "more than 65,535 bytes"},
    {"a template that computes for ever",
     "export.limited.__defaults__ = 1, 1 << 30\n"
     "seen = str(export.chat_format('{{ 10 ** (10 ** 9) }}', '', '')[1])",
     "{} export.py: warning: no chat format is written, as run.c could not follow the chat "
     "template: it takes more than 1 s"},
    {"a template that wants all memory",
     "seen = str(export.chat_format('{{ 10 ** 11 * messages[0].content }}', '', '')[1])",
     "MemoryError"},
    {"what a template says has no control characters",
     "seen = str(export.chat_format('{{ raise_exception(\"\\x1b[31m\\nred\") }}', '', '')[1])",
     "template: ?[31m red"},
    {"no heads for keys", "C['num_key_value_heads'] = -1", "the model's n_kv_heads is -1"},
    {"a long context", "C['max_position_embeddings'] = 1 << 25", "seq_len is 33554432"},
    {"a base below zero", "C['rope_theta'] = -1e4", "RoPE's frequencies are negative or not"},
    {"a base below one",
     "C['rope_theta'] = 0.5\n"
     "write_folder(C, W, F)\n"
     "export.folder_vocab = vocabs[0]\n"
     "seen = str(type(run('model', model='steep.bin')))\n"
     "export.folder_vocab = lambda *_: None", "bytes"},
    {"tokenizers for random texts",     // what run.c makes of these is looked at below
     "import random\n"
     "from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers as N, trainers\n"
     "from tokenizers import pre_tokenizers as P\n"
     "draw, space = random.Random(31), export.SPACE\n"
     "planes = [chr(c) for c in draw.sample(range(0x110000), 4000) if not 0xD800 <= c < 0xE000]\n"
     "pool = [*export.PROOF_PIECES * 9, *planes, '<s>', '<tool>', 'she', ' sea ', '99']\n"
     "def texts(n): return [''.join(draw.choices(pool, k=draw.randrange(1, 24)))\n"
     "                      for _ in range(n)]\n"
     "def with_cases(vocab):\n"
     "    vocab.cases = texts(700)\n"
     "    return vocab\n"
     "export.folder_vocab = lambda *a: with_cases(vocabs[0](*a))\n"
     "unk = dict(unk_token='<unk>', fuse_unk=True, byte_fallback=True)\n"
     "for i, (normalizer, pre, more) in enumerate((\n"
     "        (None, P.ByteLevel(False), {}),\n"
     "        (N.NFC(), P.Sequence([P.Split(Regex(r'\\p{N}{1,3}'), 'isolated'),\n"
     "                              P.ByteLevel(True)]), {}),\n"
     "        (None, P.Sequence([P.Digits(True), P.ByteLevel(False)]), {}),\n"
     "        (N.Sequence([N.Prepend(space), N.Replace(' ', space)]), None, unk),\n"
     "        (None, P.Metaspace(space, 'first', False), unk))):\n"
     "    t = Tokenizer(models.BPE(**more))\n"
     "    t.normalizer, t.pre_tokenizer = (x for x in (normalizer, pre))\n"
     "    t.train_from_iterator(texts(500), trainers.BpeTrainer(\n"
     "        vocab_size=700, show_progress=False, special_tokens=['<unk>', '<s>'],\n"
     "        limit_alphabet=300, initial_alphabet=[] if more else ByteLevel.alphabet()))\n"
     "    J = json.loads(t.to_str())\n"
     "    ids = J['model']['vocab']\n"
     "    ids.update({f'<0x{b:02X}>': len(ids) + b for b in range(256 if more else 0)})\n"
     "    t = Tokenizer.from_str(json.dumps(J))\n"
     "    t.add_tokens([AddedToken('<tool>', lstrip=True, rstrip=True), AddedToken('99'),\n"
     "                  AddedToken('she', single_word=True, normalized=False)])\n"
     "    J, C['vocab_size'] = json.loads(t.to_str()), t.get_vocab_size()\n"
     "    W[embedding] = W['lm_head.weight'] = rng.standard_normal((\n"
     "        C['vocab_size'], 256), 'f4')\n"
     "    write_folder(C, W, {'tokenizer.json': J})\n"
     "    seen = run('model', model=f'tok{i}.bin')\n"
     "    if isinstance(seen, str): break\n"
     "else: seen = 'five'\n"
     "export.folder_vocab = lambda *_: None", "five"},
    {"LoRA of the embedding",
     "A = lora('model.embed_tokens.lora_embedding_A')",
     "embed_tokens.lora_embedding_A is not supported"},
    {"LoRA of a tied classifier",
     "A = lora('lm_head.lora_A.weight')\n"
     "C['tie_word_embeddings'] = True\n"
     "del W['lm_head.weight']", "lm_head.lora_A.weight is not supported"},
    {"DoRA",
     "A = lora(wq[:-6] + 'lora_magnitude_vector')", "lora_magnitude_vector is not supported"},
    {"an adapter's bias", "A = lora(wq[:-6] + 'bias')", "q_proj.bias is not supported"},
    {"modules_to_save",
     "A = lora(wq, modules_to_save=['x'])", "modules_to_save = ['x'] is not supported"},
    {"an adapter that is a pickle", "A = lora(wq, 'bin')", "adapter_model.bin is a pickle"},
    {"an adapter's tokenizer",
     "A = lora(wq)\n"
     "open('lora/tokenizer.json', 'w')", "the adapter's tokenizer and chat template are ignored"},
    {"odd groups of llama2.c's version 2",
     "head = np.array([0x616b3432, 2, 64, 100, 1, 1, 1, 9, 9, 1 + (64 << 8)] + [0] * 60, '<i4')\n"
     "open('v2.bin', 'wb').write(head.tobytes())\n"
     "S = 'v2.bin'", "groups of 64 weights do not fit into rows of 64 and 100"},
};

static void test_exports(void) {
    enum { N = sizeof exports / sizeof *exports };
    const char *python = at_home(".venv/bin/python"), *export_py = at_home("export.py");
    if (access(at_home(".venv/ready"), F_OK) || access(export_py, R_OK) || no_program()) {
        skip(N + 4, "export.py, as there is no .venv: make .venv/ready && ./test_all exports");
        return;
    }
    Buffer script = {0};
    for (size_t i = 0; i < sizeof export_frame / sizeof *export_frame; i++)
        put_text(&script, text("%s\n", export_frame[i]));
    for (int i = 0; i < N; i++) put_text(&script, text("case(r'''%s\n''')\n", exports[i].code));
    keep("exports.py", &script);
    Ran r = SH("mkdir exports; cd exports; '%s' ../exports.py '%s'", python, home);
    CHECK(r.status == 0, "the cases of export.py run: %s", r.err.p);
    char *line = (char *)r.out.p;
    for (int i = 0; i < N; i++) {
        char *end = strchr(line, '\n');
        if (end) *end = 0;
        CHECK(strstr(line, exports[i].says), "%s: \"%s\" is in \"%s\"", exports[i].what,
              exports[i].says, line);
        line = end ? end + 1 : line + strlen(line);
    }
    prints("a model of many dtypes passes its check", "ok\n", "run exports/mixed.bin -m check -q");
    prints("so does one whose frequencies grow", "ok\n", "run exports/steep.bin -m check -q");
    prints("random texts become the tokens that the library gives", "ok\nok\nok\nok\nok\n",
           "for i in 0 1 2 3 4; do run exports/tok$i.bin -m check -q; done");
    SH("rm -rf exports");
}

#ifdef FUZZ
// ==== Fuzzing: `make fuzz` builds this with clang's libFuzzer, and FUZZ=target names what is fed =
//
// An input may do anything but crash, hang, leak without bound or break an assertion. What carries
// a hash is sealed again after each mutation, so that the fuzzer gets behind the hash.

size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t most);

static jmp_buf fuzz_end;
// What run.c allocated or mapped since the input began, and has not given back.
static struct { void *p; size_t mapped; } owned[1 << 16];
static int n_owned;
static pthread_mutex_t owned_mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *target;
static Model fuzz_model;
static Tokenizer fuzz_tokenizer, real_tokenizer;

static void *fuzz_own(void *p, size_t mapped) {
    pthread_mutex_lock(&owned_mutex);
    if (n_owned == sizeof owned / sizeof *owned) abort();
    if (p && p != MAP_FAILED) owned[n_owned].p = p, owned[n_owned++].mapped = mapped;
    pthread_mutex_unlock(&owned_mutex);
    return p;
}
static void *fuzz_disown(void *p) {
    pthread_mutex_lock(&owned_mutex);
    for (int i = n_owned; i--;)
        if (owned[i].p == p) owned[i] = owned[--n_owned];
    pthread_mutex_unlock(&owned_mutex);
    return p;
}
static void fuzz_exit(int status) {
    if (status != 0 && status != 1 && status != 2 && status != 130) abort();
    longjmp(fuzz_end, 1);
}
// Runs one input; gives back and closes what an error left behind. Without one nothing is left.
static void guarded(void (*run)(const uint8_t *, size_t), const uint8_t *data, size_t n) {
    bool ours[64];
    for (int fd = 0; fd < 64; fd++) ours[fd] = fcntl(fd, F_GETFD) >= 0;
    n_owned = 0;
    interrupted = 0;
    use_fast_functions();
    if (!setjmp(fuzz_end)) {
        run(data, n);
        if (n_owned) abort();
    }
    output_leave();
    for (int i = 0; i < n_owned; i++)
        if (owned[i].mapped) munmap(owned[i].p, owned[i].mapped);
        else (free)(owned[i].p);
    for (int fd = 0; fd < 64; fd++) if (!ours[fd]) close(fd);
    n_owned = 0;
    empty_pool();
}

static void fuzz_checkpoint(const uint8_t *data, size_t n) {
    Model m;
    Cache kv;
    load_model(&m, save("input", data, n));
    int ctx = m.c.seq_len < 8 ? m.c.seq_len : 8;
    cache_open(&kv, &m, ctx, 1);
    Slot batch[8];
    for (int i = 0; i < ctx; i++) batch[i] = (Slot){i * 7 % m.c.vocab_size, i, 0, true};
    forward(&m, &kv, batch, ctx);
    cache_close(&kv);
    Output out = {.fd = -1};
    check_model(&(Options){.quiet = true, .mode = "check"}, &m, &fuzz_tokenizer, &out);
    free(out.memory);
    free_model(&m);
}

static void code(const Tokenizer *t, const uint8_t *data, size_t n, bool lossless) {
    char *typed = memset(get(n + 1, 1), 1, n);
    for (int how = 0; how < 4; how++) {
        Ids ids = {0};
        encode(t, (Text){(const char *)data, n}, how & 1 ? typed : NULL, how & 2, &ids);
        for (size_t i = 0; i < ids.n; i++)
            if (ids.ids[i] < 0 || ids.ids[i] >= t->h.vocab_size) abort();
        Buffer back = decoded(t, ids.ids, ids.n);
        if (lossless && how == 1 && (back.n != n || (n && memcmp(back.p, data, n)))) abort();
        free(ids.ids);
    }
}
static void fuzz_tokenizer_file(const uint8_t *data, size_t n) {
    Model m = {.path = "input"};
    Tokenizer t = {0};
    m.c.vocab_size = n > 24 && data[0] == 't' ? (int)read_u32(data + 16) : n ? data[0] % 40 : 0;
    if (m.c.vocab_size < 1 || m.c.vocab_size > 1 << 24) return;
    const char *wrong = load_tokenizer(&t, save("input", data, n), &m);
    static const char words[] = "a <s> caf\xc3\xa9 12\n";
    if (!wrong) code(&t, data + (n > 300 ? n - 300 : 0), n > 300 ? 300 : n, false);
    if (!wrong) code(&t, (const uint8_t *)words, sizeof words - 1, false);
    free_tokenizer(&t);
}
static void fuzz_encode(const uint8_t *data, size_t n) {
    code(&fuzz_tokenizer, data, n, true);
    code(&real_tokenizer, data, n, false);
}

// What reads files is run on a file that holds the input.
static void run_words(const char *command) {
    const char *argv[60] = {0};
    int n = words_of(text("run %s", command), argv);
    fflush(stdout);
    run_main(n, (char **)(uintptr_t)argv);
}
static void fuzz_session(const uint8_t *data, size_t n) {
    save("input", data, n);
    run_words("endless.bin -S input -q -n 3 -j 1 -t 0 -o /dev/null");
}
static void fuzz_compressed(const uint8_t *data, size_t n) {
    save("input", data, n);
    run_words("endless.bin -m decompress -f input -q -j 1 -o /dev/null");
}
static void fuzz_chat(const uint8_t *data, size_t n) {
    uint8_t *lines_ = get(n, 1);
    for (size_t i = 0; i < n; i++)  // files in this folder only
        lines_[i] = data[i] == '/' && i && data[i - 1] != '\n' ? '_' : data[i];
    if (!freopen(save("stdin", lines_, n), "r", stdin)) abort();
    run_words("endless.bin -m chat -q -n 3 -j 1 -s 1 -c 64 -o /dev/null");
}
// Each byte of the input is a word of the command line.
static void fuzz_command(const uint8_t *data, size_t n) {
    static char *const words[] = {
        "endless.bin", "tiny.bin", "plain.bin", "llama.bin", "session", "nothing", "", "-", "--",
        "-i", "abc", "12*34=", "<s>a<think>b", "-f", "prompt", "-o", "out", "-n", "1", "2", "30",
        "0", "-1", "-m", "generate", "chat", "tokenize", "logits", "eval", "check", "bench",
        "compress", "decompress", "explain", "-t", "0.5", "1e-10", "1e10", "nan", "-p", "1", "-s",
        "18446744073709551615", "-z", "tiny.tok", "-y", "be", "-c", "16", "40", "-j", "1", "-q",
        "-h", "-V", "-k", "3", "-b", "-e", "-d", "lookup", "-S", "--top-k", "--min-p",
        "--repeat-penalty", "1.1", "--receipt", "--think", "--steps=3", "--mode=eval", "--trace",
        "--layer", "--head", "--prompt", "\xff\xc3", "1 2 3", "999999999999", "-T", "cat"};
    char *argv[16] = {"run"};
    int argc = 1, n_words = sizeof words / sizeof *words;
    for (size_t i = 0; i < n && argc < 14; i++) {
        char *w = words[data[i] % n_words];
        if (!strcmp(w, "bench")) w = "check";  // it takes seconds
        // A whole file of a model as a text takes minutes in this build.
        if (!strcmp(argv[argc - 1], "-f") && strstr(w, ".")) w = "prompt";
        argv[argc++] = w;
    }
    save("prompt", "abc d\n", 6);
    if (!freopen("prompt", "r", stdin)) abort();
    fflush(stdout);
    run_main(argc, argv);
}

// A schema, a zero byte, and a document: a mask says of each byte whether it may come.
static void fuzz_schema(const uint8_t *data, size_t n) {
    size_t end = strnlen((const char *)data, n);
    if (n < 2 || end == n) return;
    save("schema", data, end);
    Schema *s = schema_open(&(Options){.schema = "schema"});
    SchemaText x = schema_begin(s);
    bool fits = true;
    for (size_t i = end + 1; i < n && fits; i++) {
        const uint8_t *mask = schema_mask(&x, &fuzz_tokenizer);
        fits = schema_step(&x, data[i]);
        for (int id = 0; id < fuzz_tokenizer.h.vocab_size; id++) {
            Text one = decode(&fuzz_tokenizer, -1, id);
            if (one.len == 1 && (uint8_t)one.s[0] == data[i] && !is_stop(&fuzz_tokenizer, id) &&
                fits == (!mask || mask[id])) abort();
        }
    }
    schema_end(&x);
    schema_check(s, (Text){(const char *)data + end + 1, n - end - 1}, "the document");
    schema_close(s);
}

static const struct { const char *name; void (*run)(const uint8_t *, size_t); } targets[] = {
    {"checkpoint", fuzz_checkpoint}, {"tokenizer", fuzz_tokenizer_file}, {"encode", fuzz_encode},
    {"session", fuzz_session}, {"compressed", fuzz_compressed}, {"chat", fuzz_chat},
    {"command", fuzz_command}, {"schema", fuzz_schema}};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (!strcmp(target, targets[i].name)) guarded(targets[i].run, data, n);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t most, unsigned seed) {
    n = LLVMFuzzerMutate(data, n, most);
    Buffer b = {data, n, n};
    if (seed % 8 == 0) return n;
    if (!strcmp(target, "checkpoint") && n >= 512 && read_u32(data + 4) == 5)
        set64(data + 24, n), seal(&b);
    if (!strcmp(target, "tokenizer") && n > 112 && !memcmp(data, "tok4", 4))
        set64(data + 8, hash64(data + 16, n - 16));
    if (!strcmp(target, "session") && n > sizeof(SessionHeader)) {
        memcpy(data, "session7", 8);
        set64(data + offsetof(SessionHeader, hash), hash64(data, offsetof(SessionHeader, hash)));
    }
    if (!strcmp(target, "compressed") && n > sizeof(ZipHeader)) {  // and sizes that take no minutes
        ZipHeader h;
        memcpy(&h, data, sizeof h);
        memcpy(h.magic, "lmzc", 5);
        h.model = mix64(model_hash(&fuzz_model)) +
                  hash64(fuzz_tokenizer.file, fuzz_tokenizer.file_size);
        h.symbols %= 400, h.context = 16 + h.context % 64;
        memcpy(data, &h, sizeof h);
        set64(data + offsetof(ZipHeader, file_hash), zip_hash((Text){(char *)data, n}));
    }
    return n;
}

// Writes the seeds of a target into a folder.
static void seed(const char *where, const Buffer *b) {
    static int n;
    FILE *f = fopen(text("%s/seed%d", where, n++), "wb");
    if (!f || fwrite(b->p, 1, b->n, f) != b->n || fclose(f)) abort();
}
static void seed_corpus(const char *where) {
    Buffer b;
    for (int which = 0; which < N_FAMILIES && !strcmp(target, "checkpoint"); which++)
        for (int dtype = ROWS; dtype <= Q4A; dtype++) {
            if (dtype == ROWS && which != LLAMA) continue;
            Shape s = family(which, dtype);
            s.vocab = 20, s.layers = 1, s.dim = 32, s.hidden = 32, s.heads = s.kv_heads = 1;
            s.head_dim = 16, s.seq_len = 32;
            Made m = make_weights(&s);
            if (dtype != ROWS) certify(&m);
            b = dtype == ROWS ? llama2c_file(&m, 0) : version_5(&m), seed(where, &b);
            if (dtype == ROWS) b = llama2c_file(&m, 1), seed(where, &b);
        }
    if (!strcmp(target, "tokenizer")) b = slurp("tiny.tok"), seed(where, &b);
    if (!strcmp(target, "session") && !setjmp(fuzz_end))
        run_words("endless.bin -S made -q -n 5 -j 1 -i abc -o /dev/null -c 100");
    if (!strcmp(target, "compressed") && !setjmp(fuzz_end))
        run_words("endless.bin -m compress -i 'abc d abc d \xff\xfe cab d' -q -j 1 -c 40 -o made");
    for (size_t i = 0; i < sizeof schema_cases / sizeof *schema_cases; i++) {
        const char *schema = schema_cases[i].schema, *document = schema_cases[i].document;
        b = bytes_of(text("%s%c%s", schema, 0, document), strlen(schema) + strlen(document) + 1);
        if (!strcmp(target, "schema")) seed(where, &b);
    }
    b = slurp("made"), seed(where, &b);
    b = bytes_of("Hi\n/save a\n/undo\n/load a\nabc\n", 29), seed(where, &b);
    b = bytes_of("\0\x9\xa\x11\x12", 5), seed(where, &b);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    target = getenv("FUZZ");
    const char *temporary = getenv("TMPDIR"), *path = getenv("FUZZ_TOKENIZER");
    snprintf(folder, sizeof folder, "%.200s/fuzz.XXXXXX", temporary ? temporary : "/tmp");
    if (!target || !mkdtemp(folder) || chdir(folder)) fprintf(stderr, "FUZZ=target?\n"), _exit(1);
    make_models();
    load_model(&fuzz_model, "endless.bin");
    find_tokenizer(&fuzz_tokenizer, NULL, &fuzz_model);
    static Model real = {.path = "tokenizer.bin", .c.vocab_size = 49152};
    if (path && load_tokenizer(&real_tokenizer, path, &real)) abort();
    if (getenv("FUZZ_SEEDS")) seed_corpus(getenv("FUZZ_SEEDS")), _exit(0);
    return 0;
}
#else
// ==== main =======================================================================================

// The closing line. A test that ends the program, as run.c's errors do, has failed.
static void finish(void) {
    if (!finished) CHECK(false, "the tests of this group come to their end");
    remove_folder();
    for (int i = 0; i < n_skips; i++) printf("skipped: %s\n", skips[i]);
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed,
           failed, skipped);
    fflush(stdout);
}

static void too_long(int signal_number) {
    static const char words[] = "test_all: a group of tests takes too long\n0 passed, 1 failed\n";
    (void)signal_number;
    if (write(1, words, sizeof words - 1) < 0) {}
    remove_folder();
    _exit(1);
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*test)(void); } groups[] = {
        {"numbers", test_numbers}, {"quantize", test_quantize}, {"products", test_products},
        {"attention", test_attention}, {"forward", test_forward},
        {"same-bytes", test_same_bytes}, {"sampler", test_sampler},
        {"tokenizer", test_tokenizer}, {"files", test_files}, {"commands", test_commands},
        {"decoders", test_decoders}, {"schema", test_schema}, {"sessions", test_sessions},
        {"explain", test_explain},
        {"compress", test_compression}, {"faults", test_faults}, {"signals", test_signals},
        {"robust", test_robust}, {"forger", test_forger}, {"models", test_models},
        {"readme", test_readme}, {"exports", test_exports}};
    bool tiny = argc == 3 && !strcmp(argv[1], "--tiny");
    strcpy(folder, "/tmp/test_all.XXXXXX");
    if (!getcwd(home, sizeof home) || (!tiny && !mkdtemp(folder)) || chdir(tiny ? argv[2] : folder))
        perror("a folder for the tests"), exit(1);
    if (tiny) return make_models(), 0;
    use_fast_functions();
    signal(SIGALRM, too_long);
    atexit(finish);
    int tested = 0;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        bool wanted = argc == 1;
        for (int j = 1; j < argc; j++) wanted |= strstr(groups[i].name, argv[j]) != NULL;
        if (!wanted) continue;
        int passed_before = passed, failed_before = failed, skipped_before = skipped;
        double began = seconds();
        group = groups[i].name;
        random_state = i + 1;
        alarm(patience(300));
        groups[i].test();
        empty_pool();
        printf("%-13s %5d passed, %d failed, %d skipped  %5.1f s\n", group, passed - passed_before,
               failed - failed_before, skipped - skipped_before, seconds() - began);
        fflush(stdout);
        tested++;
    }
    if (!tested) CHECK(false, "there is a group called %s", argv[1]);
    finished = true;
    return failed > 0;
}
#endif
#endif

/* test_all.c - the tests of run.c, which is included here without its main.
 *
 *     make test             builds and runs everything
 *     ./test_all NAME       runs the groups whose name contains NAME
 *     ./test_all --tiny DIR writes a small random model to DIR: tiny.bin and tiny.tok
 *
 * Every block of run.c is held against a second definition of the same thing, written here from the
 * description and in double precision; then the whole model against a second transformer. Models
 * and tokenizers are made here, small and from fixed random numbers, in a temporary folder. What
 * needs ./run (RUN names another), model.bin, ../shared or MODELS=folder says so without it.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#if defined FUZZ || defined FAULTS  // headers of the functions that are replaced in run.c
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#endif
#ifdef FUZZ  // with run.c's main, whose exits come back to the fuzzer: see the end of this file
static __attribute__((noreturn)) void fuzz_exit(int status);
static void *fuzz_own(void *p);
static void *fuzz_disown(void *p);
static void *fuzz_mmap(void *at, size_t n, int protection, int flags, int fd, long offset);
static int fuzz_munmap(void *at, size_t n);
#define exit fuzz_exit
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define malloc(n) fuzz_own(malloc(n))
#define realloc(p, n) fuzz_own(realloc(fuzz_disown(p), n))
#define posix_memalign(p, align, n) (posix_memalign(p, align, n) || !fuzz_own(*(p)))
#define free(p) free(fuzz_disown(p))  // in the tests, too, which free what run.c returns
#define atexit(function) ((void)(function))
#define main run_main
#elif defined FAULTS
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
#define pwrite(...) (fault("pwrite", ENOSPC) ? -1 : pwrite(__VA_ARGS__))
#define fsync(...) (fault("fsync", EIO) ? -1 : fsync(__VA_ARGS__))
#define msync(...) (fault("msync", EIO) ? -1 : msync(__VA_ARGS__))
#define rename(...) (fault("rename", EACCES) ? -1 : rename(__VA_ARGS__))
#define mkstemp(...) (fault("mkstemp", EACCES) ? -1 : mkstemp(__VA_ARGS__))
#define ftruncate(...) (fault("ftruncate", ENOSPC) ? -1 : ftruncate(__VA_ARGS__))
#define posix_fallocate(...)                                                                       \
    (fault("posix_fallocate", ENOSPC) ? ENOSPC : posix_fallocate(__VA_ARGS__))
#define fcntl(...) (fault("fcntl", ENOLCK) ? -1 : fcntl(__VA_ARGS__))
#define fork() (fault("fork", EAGAIN) ? -1 : fork())
#define pipe(...) (fault("pipe", EMFILE) ? -1 : pipe(__VA_ARGS__))
#define pthread_create(...) (fault("pthread_create", EAGAIN) ? EAGAIN : pthread_create(__VA_ARGS__))
#define getline(...) (fault("getline", EIO) ? -1 : getline(__VA_ARGS__))
#define open_memstream(...) (fault("open_memstream", ENOMEM) ? NULL : open_memstream(__VA_ARGS__))
#else
#define TESTING
#endif
#include "run.c"
#ifndef FAULTS  // the rest of the file is the tests
#undef main
#undef exit
#undef mmap
#undef munmap
#undef malloc
#undef realloc
#undef posix_memalign
#undef atexit
#include <dirent.h>
#include <sys/resource.h>
#include <sys/wait.h>

// =================================================================================================
// Counting, and small helpers
// =================================================================================================

static int passed, failed, skipped;

// Seconds after which something hangs; under a tool that slows it down, PATIENCE times as many.
static unsigned patience(unsigned seconds_) {
    return seconds_ * (getenv("PATIENCE") ? (unsigned)atoi(getenv("PATIENCE")) : 1);
}
static const char *group = "";

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

static __attribute__((format(printf, 2, 3))) void skip(int n, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("  skipped: ");
    vprintf(format, args);
    putchar('\n');
    va_end(args);
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
static int round_to(int n, int to) { return (n + to - 1) / to * to; }
static void *get(size_t n, size_t size) {
    void *p = calloc(n + !n, size);
    if (!p) abort();
    return p;
}

// Bytes that grow.
typedef struct { uint8_t *p; size_t n, room; } Buffer;
static void put(Buffer *b, const void *data, size_t n) {
    if (!n) return;
    if (b->n + n > b->room) {
        b->p = realloc(b->p, b->room = (b->n + n) * 2);
        if (!b->p) abort();
    }
    if (data) memcpy(b->p + b->n, data, n);
    else memset(b->p + b->n, 0, n);
    b->n += n;
}
static void put32(Buffer *b, int64_t value) { uint32_t u = (uint32_t)value; put(b, &u, 4); }
static void align(Buffer *b, size_t to) { if (b->n % to) put(b, NULL, to - b->n % to); }
static void set32(uint8_t *p, int64_t value) { uint32_t u = (uint32_t)value; memcpy(p, &u, 4); }
static void set64(uint8_t *p, uint64_t value) { memcpy(p, &value, 8); }
static void set_float(uint8_t *p, float value) { memcpy(p, &value, 4); }

// The files' hash, from its description.
static uint64_t hash_of(const uint8_t *p, size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i <= n; i += 8) {  // the length, then the words
        uint64_t z = n, w = 0;
        if (i) {
            memcpy(&w, p + i - 8, 8);
            z = w + i / 8 * 0x9E3779B97F4A7C15u;
        }
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        sum += z ^ z >> 31;
    }
    if (n % 8) {
        uint64_t w = 0;
        memcpy(&w, p + n / 8 * 8, n % 8);
        w += (n / 8 + 1) * 0x9E3779B97F4A7C15u;
        w = (w ^ w >> 30) * 0xBF58476D1CE4E5B9u;
        w = (w ^ w >> 27) * 0x94D049BB133111EBu;
        sum += w ^ w >> 31;
    }
    return sum;
}

// ---- Files in a temporary folder

static char folder[256];
static const char *in_folder(const char *name) {  // stays valid
    static char paths[256][300];
    for (int i = 0; i < 256; i++) {
        if (!paths[i][0]) snprintf(paths[i], sizeof paths[i], "%.200s/%.60s", folder, name);
        if (!strcmp(paths[i] + strlen(folder) + 1, name)) return paths[i];
    }
    abort();
}
static const char *save(const char *name, const void *data, size_t n) {
    const char *path = in_folder(name);
    unlink(path);
    FILE *f = fopen(path, "wb");
    if (!f || (n && fwrite(data, 1, n, f) != n) || fclose(f)) perror(path), abort();
    return path;
}
static Buffer slurp(const char *path) {
    Buffer b = {0};
    FILE *f = fopen(path, "rb");
    char part[65536];
    if (f) {
        for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) put(&b, part, n);
        fclose(f);
    }
    put(&b, NULL, 1);  // a zero byte behind the text
    b.n--;
    return b;
}
static int files_in_folder(void) {
    DIR *d = opendir(folder);
    int n = 0;
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}
static void remove_folder(void) {
    DIR *d = folder[0] ? opendir(folder) : NULL;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        char path[600];
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        if (unlink(path)) rmdir(path);
    }
    if (d) closedir(d);
    if (d) rmdir(folder);
}

// =================================================================================================
// Making models: tensors with known values, packed as the file format describes
// =================================================================================================

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
    t.bytes = get(t.n, 1);
    memcpy(t.bytes, t.values, t.n);
    return t;
}
static Tensor bytes_tensor(const Buffer *b) {
    Tensor t = {BYTES, 1, (int)b->n, NULL, get(b->n, 1), b->n};
    if (b->n) memcpy(t.bytes, b->p, b->n);
    return t;
}
static void free_tensor(Tensor *t) {
    free(t->values);
    free(t->bytes);
    *t = (Tensor){0};
}

// A random matrix whose products with numbers of size 1 have about that size.
static Tensor matrix(int dtype, int rows, int cols) {
    size_t nb = (size_t)(cols + 31) / 32, panels = (size_t)(rows + 15) / 16, wide = (size_t)cols;
    size_t scales = dtype == Q4A ? 64 : 32;  // bytes of a block's scales, in front of its quants
    size_t block = scales + (dtype == Q8 ? 512 : 256), panel = nb * block;
    if (dtype <= BF16) panel = dtype == BF16 ? (wide + 1) / 2 * 64 : wide * 64;
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
                if (dtype == BF16) memcpy(p + 2 * ((c / 2 * 16 + R) * 2 + c % 2), &upper, 2);
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

typedef struct {
    const char *name;
    int dtype, embedding, flags;
    int dim, hidden, layers, heads, kv_heads, head_dim, vocab, seq_len;
    int activation, window;
    unsigned local;  // bit l: layer l is local
    float embed_scale;
} Shape;

enum { ATTN_NORM, WQ, WK, WV, BQ, BK, BV, Q_NORM, K_NORM, WO, POST_ATTN, FFN_NORM, GATE, UP, DOWN,
       POST_FFN, PER_LAYER };
enum { MOST_LAYERS = 16 };
typedef struct {
    Shape s;
    float eps, attn_scale;
    Tensor rope[2], embedding, layer[MOST_LAYERS][PER_LAYER], final_norm, classifier;
    Tensor check_ids, check_norms, check_logits, check_cases;
    uint64_t tokenizer_hash;
} Made;

static Made make_weights(const Shape *s) {
    Made m = {.s = *s, .eps = 1e-5f, .attn_scale = (float)(1 / sqrt(s->head_dim))};
    int qd = s->heads * s->head_dim, kvd = s->kv_heads * s->head_dim, half = s->head_dim / 2;
    for (int t = 0; t < 2; t++) {
        m.rope[t] = vector(half, 0, 0);
        for (int i = 0; i < half; i++)
            m.rope[t].values[i] = (float)pow(t ? 100 : 10000, -(double)i / half);
        memcpy(m.rope[t].bytes, m.rope[t].values, m.rope[t].n);
    }
    m.embedding = matrix(s->embedding, s->vocab, s->dim);
    for (int l = 0; l < s->layers; l++) {
        Tensor *t = m.layer[l];
        int norms[] = {ATTN_NORM, FFN_NORM, POST_ATTN, POST_FFN};
        for (int i = 0; i < (s->flags & SANDWICH_NORM ? 4 : 2); i++)
            t[norms[i]] = vector(s->dim, 1, 0.1);
        t[WQ] = matrix(s->dtype, qd, s->dim);
        t[WK] = matrix(s->dtype, kvd, s->dim);
        t[WV] = matrix(s->dtype, kvd, s->dim);
        if (s->flags & QKV_BIAS)
            t[BQ] = vector(qd, 0, 0.3), t[BK] = vector(kvd, 0, 0.3), t[BV] = vector(kvd, 0, 0.3);
        if (s->flags & QK_NORM)
            t[Q_NORM] = vector(s->head_dim, 1.2, 0.1), t[K_NORM] = vector(s->head_dim, 1.2, 0.1);
        t[WO] = matrix(s->dtype, s->dim, qd);
        t[GATE] = matrix(s->dtype, s->hidden, s->dim);
        t[UP] = matrix(s->dtype, s->hidden, s->dim);
        t[DOWN] = matrix(s->dtype, s->dim, s->hidden);
    }
    m.final_norm = vector(s->dim, 1, 0.1);
    if (!(s->flags & TIED_EMBEDDING)) m.classifier = matrix(s->embedding, s->vocab, s->dim);
    m.check_ids = bytes_tensor(&(Buffer){0});
    m.check_norms = vector(s->layers + 1, 0, 0);
    m.check_logits = vector(s->vocab, 0, 0);
    m.check_cases = bytes_tensor(&(Buffer){0});
    return m;
}
static void free_made(Made *m) {
    Tensor *all[] = {&m->rope[0], &m->rope[1], &m->embedding, &m->final_norm, &m->classifier,
                     &m->check_ids, &m->check_norms, &m->check_logits, &m->check_cases};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free_tensor(all[i]);
    for (int l = 0; l < m->s.layers; l++)
        for (int i = 0; i < PER_LAYER; i++) free_tensor(&m->layer[l][i]);
}

// Writes both hashes of a version 3 file anew.
static void seal(Buffer *b) {
    if (b->n < 256) return;
    set64(b->p + 104, 0);
    set64(b->p + 248, 0);
    size_t directory = 256 + 32 * (size_t)read_u32(b->p + 124);
    uint64_t header = hash_of(b->p, directory < b->n ? directory : b->n);
    set64(b->p + 104, hash_of(b->p, b->n));
    set64(b->p + 248, header);
}

static Buffer version_3(const Made *m) {
    const Shape *s = &m->s;
    const Tensor *list[3 + MOST_LAYERS * PER_LAYER + 8];
    int n = 0;
    list[n++] = &m->rope[0];
    if (s->flags & LOCAL_ROPE) list[n++] = &m->rope[1];
    list[n++] = &m->embedding;
    for (int l = 0; l < s->layers; l++)
        for (int i = 0; i < PER_LAYER; i++) if (m->layer[l][i].bytes) list[n++] = &m->layer[l][i];
    list[n++] = &m->final_norm;
    if (!(s->flags & TIED_EMBEDDING)) list[n++] = &m->classifier;
    list[n++] = &m->check_ids;
    list[n++] = &m->check_norms;
    list[n++] = &m->check_logits;
    list[n++] = &m->check_cases;

    Buffer b = {0};
    put(&b, NULL, 256 + 32 * (size_t)n);
    for (int i = 0; i < n; i++) {
        align(&b, 64);
        uint8_t *e = b.p + 256 + 32 * i;
        set32(e, list[i]->dtype), set32(e + 4, list[i]->rows), set32(e + 8, list[i]->cols);
        set64(e + 16, b.n), set64(e + 24, list[i]->n);
        put(&b, list[i]->bytes, list[i]->n);
    }
    align(&b, 64);
    int head[] = {0x616b3432, 3, s->dim, s->hidden, s->layers, s->heads, s->kv_heads, s->vocab,
                  s->seq_len, s->head_dim};
    memcpy(b.p, head, sizeof head);
    set_float(b.p + 40, m->eps), set32(b.p + 44, s->flags), set32(b.p + 48, s->activation);
    set_float(b.p + 52, s->embed_scale), set_float(b.p + 56, m->attn_scale);
    set32(b.p + 60, s->window), set32(b.p + 64, s->local);
    set64(b.p + 96, m->tokenizer_hash), set64(b.p + 112, b.n);
    set32(b.p + 120, s->dtype), set32(b.p + 124, n);
    memcpy(b.p + 176, s->name, strlen(s->name));
    seal(&b);
    return b;
}

// llama2.c's files: version 0 has its tensors in another order than version 1.
static Buffer llama2c_file(const Made *m, int version) {
    const Shape *s = &m->s;
    bool tied = s->flags & TIED_EMBEDDING;
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

// ---- The second transformer: double precision, one token after the other, nothing clever

// x rounded to int8 by blocks of 32, as activations are before they meet quantized weights; keys,
// whose scales are in half precision; values, which have one block; and attention's weights, by 16
// positions. Returns the last scale.
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
    free(x);
}
static void norm(double *y, const double *x, const Tensor *w, double eps) {
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

// Logits (n, vocab) of all positions of ids (n), and norms (layers + 1) of the last residual.
static void reference(const Made *m, const int *ids, int n, double *logits, double *norms) {
    const Shape *s = &m->s;
    int hd = s->head_dim, qd = s->heads * hd, kvd = s->kv_heads * hd, dim = s->dim;
    int width = dim + qd + kvd + s->hidden;
    double *keys = get((size_t)(s->layers * n * kvd), 8),
           *values = get((size_t)(s->layers * n * kvd), 8),
           *scales = get((size_t)(s->layers * n * s->kv_heads), 8);  // of values
    double *x = get((size_t)dim, 8), *xb = get((size_t)width, 8), *q = get((size_t)width, 8);
    double *out = get((size_t)width, 8), *up = get((size_t)width, 8), *p = get((size_t)n, 8);
    for (int pos = 0; pos < n; pos++) {
        for (int i = 0; i < dim; i++)
            x[i] = (double)m->embedding.values[(size_t)ids[pos] * (size_t)dim + (size_t)i] *
                   (double)s->embed_scale;
        for (int l = 0; l <= s->layers; l++) {
            double sum = 0;
            for (int i = 0; i < dim; i++) sum += x[i] * x[i];
            if (norms) norms[l] = sqrt(sum);
            if (l == s->layers) break;
            const Tensor *t = m->layer[l];
            bool local = s->window && s->local >> l & 1;
            const Tensor *freqs = &m->rope[local && s->flags & LOCAL_ROPE];
            double *k = keys + (size_t)((l * n + pos) * kvd),
                   *v = values + (size_t)((l * n + pos) * kvd);
            norm(xb, x, &t[ATTN_NORM], (double)m->eps);
            times(q, &t[WQ], xb), times(k, &t[WK], xb), times(v, &t[WV], xb);
            plus_bias(q, &t[BQ]), plus_bias(k, &t[BK]), plus_bias(v, &t[BV]);
            for (int h = 0; h < s->heads + s->kv_heads; h++) {
                double *head = h < s->heads ? q + h * hd : k + (h - s->heads) * hd;
                const Tensor *w = &t[h < s->heads ? Q_NORM : K_NORM];
                if (w->bytes) norm(head, head, w, (double)m->eps);
                turn(head, freqs, pos);
                if (s->embedding >= Q8) round_activations(head, hd, 32, h >= s->heads);
            }
            for (int h = 0; h < s->kv_heads; h++)
                scales[(l * n + pos) * s->kv_heads + h] =
                    s->embedding >= Q8 ? round_activations(v + h * hd, hd, hd, false) : 1;
            for (int i = 0; i < kvd && s->embedding == BF16; i++) {
                k[i] = half_value(nearest_half(k[i]));
                v[i] = half_value(nearest_half(v[i]));
            }
            for (int h = 0; h < s->heads; h++) {
                int kv_head = h / (s->heads / s->kv_heads), at = kv_head * hd;
                int first = local ? pos - s->window + 1 : 0;
                const double *scale = scales + l * n * s->kv_heads + kv_head;
                double total = 0;
                first = first < 0 ? 0 : first;
                for (int j = first; j <= pos; j++) {
                    double score = 0;
                    for (int d = 0; d < hd; d++)
                        score += q[h * hd + d] * keys[(l * n + j) * kvd + at + d];
                    total += p[j] = exp(score * (double)m->attn_scale);
                }
                for (int j = 0; j <= pos; j++)
                    p[j] = j < first ? 0 : p[j] / total * scale[j * s->kv_heads];
                if (s->embedding >= Q8) round_activations(p, pos + 1, 16, false);
                for (int d = 0; d < hd; d++) {
                    out[h * hd + d] = 0;
                    for (int j = first; j <= pos; j++)
                        if (scale[j * s->kv_heads] > 0)
                            out[h * hd + d] += p[j] / scale[j * s->kv_heads] *
                                               values[(l * n + j) * kvd + at + d];
                }
            }
            times(xb, &t[WO], out);
            if (t[POST_ATTN].bytes) norm(xb, xb, &t[POST_ATTN], (double)m->eps);
            plus(x, xb, dim);
            norm(xb, x, &t[FFN_NORM], (double)m->eps);
            times(out, &t[GATE], xb), times(up, &t[UP], xb);
            for (int i = 0; i < s->hidden; i++) {
                double g = out[i], u = sqrt(2 / 3.14159265358979324) * (g + 0.044715 * g * g * g);
                out[i] = up[i] * (s->activation ? 0.5 * g * (1 + tanh(u)) : g / (1 + exp(-g)));
            }
            times(xb, &t[DOWN], out);
            if (t[POST_FFN].bytes) norm(xb, xb, &t[POST_FFN], (double)m->eps);
            plus(x, xb, dim);
        }
        norm(xb, x, &m->final_norm, (double)m->eps);
        times(logits + (size_t)pos * (size_t)s->vocab,
              m->classifier.bytes ? &m->classifier : &m->embedding, xb);
    }
    double *all[] = {keys, values, scales, x, xb, q, out, up, p};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

// Gives a made model its certificate: a few tokens, and what the second transformer makes of them.
static void certify(Made *m) {
    int ids[10], n = 10;
    double *logits = get((size_t)(n * m->s.vocab), 8), norms[MOST_LAYERS + 1];
    for (int i = 0; i < n; i++) ids[i] = below(m->s.vocab);
    reference(m, ids, n, logits, norms);
    free_tensor(&m->check_ids);
    m->check_ids = bytes_tensor(&(Buffer){(uint8_t *)ids, sizeof ids, 0});
    for (int l = 0; l <= m->s.layers; l++) m->check_norms.values[l] = (float)norms[l];
    for (int i = 0; i < m->s.vocab; i++)
        m->check_logits.values[i] = (float)logits[(n - 1) * m->s.vocab + i];
    memcpy(m->check_norms.bytes, m->check_norms.values, m->check_norms.n);
    memcpy(m->check_logits.bytes, m->check_logits.values, m->check_logits.n);
    free(logits);
}

// The shapes of the tests: the features of the families, in odd sizes.
enum { LLAMA, QWEN2, QWEN3, GEMMA, N_FAMILIES };
static Shape family(int which, int dtype) {
    static const Shape shapes[] = {
        {"llama", 0, 0, 0, 64, 96, 2, 4, 2, 16, 77, 700, 0, 0, 0, 1},
        {"qwen2", 0, 0, TIED_EMBEDDING | QKV_BIAS, 37, 51, 2, 3, 1, 12, 77, 700, 0, 0, 0, 1},
        {"qwen3", 0, 0, QK_NORM, 40, 70, 2, 5, 1, 24, 83, 700, 0, 9, 1, 1},
        {"gemma", 0, 0, TIED_EMBEDDING | QK_NORM | SANDWICH_NORM | LOCAL_ROPE, 36, 50, 3, 4, 4, 12,
         77,
         700, 1, 21, 5, 6},
    };
    Shape s = shapes[which];
    s.dtype = dtype;
    s.embedding = dtype >= Q4 ? Q8 : dtype;
    return s;
}
static const char *const formats[] = {"rows", "f32", "bf16", "q8", "q4", "q4a"};

static Model open_made(const Made *made, const char *name) {
    Buffer b = made->s.dtype == ROWS ? llama2c_file(made, 0) : version_3(made);
    Model m;
    load_model(&m, save(name, b.p, b.n));
    free(b.p);
    return m;
}

static void set_threads(int n) {  // 1, or all of the three that were started
#ifndef PLAIN
    if (pool.n_threads < 3 && n > 1) {
        static bool started;
        if (!started) start_threads(3);
        started = true;
    }
    pool.n_threads = n > 1 ? 3 : 1;
#endif
    (void)n;
}

// =================================================================================================
// 1. Numbers
// =================================================================================================

static void test_numbers(void) {
    int wrong = 0, back = 0;
    for (unsigned h = 0; h < 65536; h++) {
        double expected = half_value(h), x = (double)half_to_float((uint16_t)h);
        bool same = isnan(expected) ? isnan(x) : x == expected && signbit(x) == signbit(expected);
        if (!same && !wrong++) printf("  half %04x is %g, not %g\n", h, x, expected);
        if ((h & 0x7c00) != 0x7c00 && float_to_half((float)x) != h && !back++)
            printf("  half %04x\n", h);
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
    CHECK(float_to_half(1e6f) == 0x7bff && float_to_half(-1e6f) == 0xfbff &&
              float_to_half(65520) == 0x7bff && float_to_half(INFINITY) == 0x7bff &&
              float_to_half(-INFINITY) == 0xfbff,
          "halves saturate at 65504");
    CHECK(float_to_half(0x1p-25f) == 0 && float_to_half(0x1.8p-25f) == 1 &&
              float_to_half(-0.0f) == 0x8000,
          "the smallest halves round to even, and zero keeps its sign");

    double worst = 0, worst_log = 0, worst_double = 0, worst_angle = 0;
    for (int i = 0; i < 200000; i++) {
        float x = (float)(uniform() * 174 - 87);
        worst = worse(worst, fabs((double)exp_(x) / exp((double)x) - 1));
        double y = (uniform() * 2 - 1) * (i % 2 ? 700 : 20),
               z = ldexp(1 + uniform(), below(120) - 60);
        double off = fabs(exp_double(y) / exp(y) - 1);
        worst_double = worse(worst_double, i % 2 ? off / 1000 : off);
        worst_log = worse(worst_log, fabs(log_(z) - log(z)) / worse(1, fabs(log(z))));
        float angle = (float)(uniform() * (i % 2 ? 100 : 1 << 24)), cosine, sine;
        cos_sin((double)angle, &cosine, &sine);
        worst_angle = worse(worst_angle, fabs((double)cosine - cos((double)angle)));
        worst_angle = worse(worst_angle, fabs((double)sine - sin((double)angle)));
    }
    CHECK(worst < 2e-7, "exp_ is within 2e-7 of e^x: %g", worst);
    CHECK(worst_double < 1e-12, "exp_double is within 1e-12 of e^x up to 20, 1e-9 up to 700: %g",
          worst_double);
    CHECK(worst_log < 1e-15, "log_ is within 1e-15 of ln x: %g", worst_log);
    CHECK(worst_angle < 6e-8, "cos_sin is within 6e-8 up to 2^24: %g", worst_angle);
    CHECK(exp_(0) == 1 && exp_(-1e30f) < 2e-38f && exp_(-INFINITY) >= 0 && isfinite(exp_(1e30f)),
          "exp_ has sane values at its ends");

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

    float x[700], y[700], w[700], p[16];
    double worst_norm = 0, worst_soft = 0, worst_sum = 0;
    for (int n = 1; n < 700; n += 1 + n / 9) {
        double squares = 0, sum = 0, most = -1e9, exact = 0;
        for (int i = 0; i < 16; i++) exact += (double)(p[i] = (float)spread());
        worst_sum = worse(worst_sum, fabs((double)tree_sum(p) - exact));
        for (int i = 0; i < n; i++) x[i] = (float)(4 * spread()), w[i] = (float)spread();
        for (int i = 0; i < n; i++) squares += (double)x[i] * (double)x[i];
        rmsnorm(y, x, w, n, 1e-5f);
        double size = sqrt(squares / n + 1e-5);
        for (int i = 0; i < n; i++)
            worst_norm = worse(worst_norm, fabs((double)y[i] - (double)(w[i] * x[i]) / size));
        int first = below(n);
        for (int i = first; i < n; i++) most = worse(most, (double)x[i]);
        for (int i = first; i < n; i++) sum += exp((double)x[i] - most);
        memcpy(y, x, sizeof x);
        softmax(y, first, n);
        for (int i = first; i < n; i++)
            worst_soft = worse(worst_soft, fabs((double)y[i] - exp((double)x[i] - most) / sum));
        worst_soft = worse(worst_soft, memcmp(x, y, (size_t)first * 4) ? 1 : 0);
    }
    CHECK(worst_sum < 1e-5, "tree_sum adds up all 16: off by %g", worst_sum);
    CHECK(worst_norm < 1e-5, "rmsnorm divides by the root of the mean square: off by %g",
          worst_norm);
    CHECK(worst_soft < 1e-6, "softmax gives e^x / sum of e^x, and only from first on: off by %g",
          worst_soft);
    CHECK(bits_of(tree_sum((float[16]){1e8f, 1, 0, 0, 0, 0, 0, 0, -1e8f, 1})) == bits_of(2),
          "tree_sum adds element i and i + 8 first");
}

// =================================================================================================
// 2. Quantized numbers and matrix products
// =================================================================================================

static void test_quantize(void) {
    Quantized x = new_quantized(16, 96), *xq = &x;
    float in[96];
    int wrong = 0, sums = 0;
    for (int round = 0; round < 3000; round++) {
        double size = ldexp(1, below(200) - 100);
        for (int i = 0; i < 96; i++) in[i] = (float)(size * spread());
        int token = below(16);
        quantize(xq, token, in, 96);
        for (int b = 0; b < 3; b++) {
            size_t at = block_at(&x, token, b);
            float most = 0, d = x.d[at];
            int sum = 0;
            for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(in[b * 32 + i]));
            wrong += d != most / 127.0f;
            for (int i = 0; i < 32; i++) {
                int q = x.q[at * 32 + (size_t)i];
                wrong += q != (int)nearbyintf(in[b * 32 + i] * (1.0f / d)) || q < -127 || q > 127;
                sum += q;
            }
            sums += x.dsum[at] != d * (float)sum;
        }
    }
    CHECK(!wrong, "activations become round(x / d), d = max|x| / 127: %d do not", wrong);
    CHECK(!sums, "each block's scaled sum is right: %d are not", sums);
    for (int i = 0; i < 32; i++) in[i] = (float)(i - 16) + 0.5f;
    in[0] = 127;
    quantize(xq, 3, in, 32);
    wrong = 0;
    for (int i = 1; i < 32; i++) wrong += x.q[block_at(&x, 3, 0) * 32 + (size_t)i] % 2 != 0;
    CHECK(x.d[block_at(&x, 3, 0)] == 1 && !wrong, "halves round to the even number");

    float odd[] = {0, -0.0f, 0x1p-149f, 126 * FLT_MIN, INFINITY, -INFINITY, NAN};
    for (int i = 0; i < 7; i++) {
        for (int j = 0; j < 32; j++) in[j] = j == 5 ? odd[i] : 0;
        quantize(xq, 1, in, 32);
        size_t at = block_at(&x, 1, 0);
        bool zero = i >= 4 || x.dsum[at] == 0;
        for (int j = 0; j < 32; j++) zero &= x.q[at * 32 + (size_t)j] == 0;
        CHECK(zero && (i < 4 ? x.d[at] == 0 : isnan(x.d[at])),
              "a block with %g has scale %s", (double)odd[i], i < 4 ? "zero" : "NaN");
    }
    for (int j = 0; j < 32; j++) in[j] = 127 * FLT_MIN;
    quantize(xq, 1, in, 32);
    CHECK(x.d[block_at(&x, 1, 0)] == FLT_MIN && x.q[block_at(&x, 1, 0) * 32] == 127,
          "the smallest normal scale still counts");
    for (int j = 0; j < 32; j++) in[j] = j ? FLT_MAX / 3 : -FLT_MAX;
    quantize(xq, 1, in, 32);
    CHECK(x.q[block_at(&x, 1, 0) * 32] == -127 && x.q[block_at(&x, 1, 0) * 32 + 1] == 42,
          "the largest numbers quantize too");
    for (int j = 0; j < 96; j++) in[j] = (float)(96 - j);
    for (int n = 65; n < 96; n += 15) {  // a last block that is not full
        quantize(xq, 1, in, 96);
        quantize(xq, 2, in, n);
        size_t at = block_at(&x, 1, 2) * 32, to = block_at(&x, 2, 2) * 32;
        CHECK(x.d[at / 32] == x.d[to / 32] && !memcmp(x.q + at, x.q + to, (size_t)n - 64) &&
                  !x.q[to + (size_t)n - 64] && !x.q[to + 31],
              "numbers after the %dth count as zero", n);
    }
    free(x.q);
}

// One matrix times 1 to 17 and 40 tokens, plain and fast, against double precision.
static void test_product(int dtype, int rows, int cols) {
    enum { MOST = 40 };
    Tensor t = matrix(dtype, rows, cols);
    Matrix w = {dtype, rows, cols, t.bytes};
    int wrong = 0, differ = 0, panels = (rows + 15) / 16, wide = padded(cols);
    int stride = rows == 64 ? 1024 : rows + 3;  // outputs 4 KiB apart are written in another way
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++)
            wrong += weight(&w, r, c) != t.values[(size_t)r * (size_t)cols + (size_t)c];
    CHECK(!wrong, "weight() reads %s %d x %d: %d are wrong", formats[dtype], rows, cols, wrong);
    Quantized space = new_quantized(MOST, cols), *xq = &space;
    float *x = get((size_t)(MOST * wide), 4), *y = get((size_t)(MOST * stride), 4),
          *fast = get((size_t)(MOST * stride), 4);
    double *in = get((size_t)wide, 8), *out = get((size_t)rows, 8), worst = 0;
    for (int i = 0; i < MOST; i++)
        for (int c = 0; c < cols; c++) x[i * wide + c] = (float)(spread() * (i == 4 ? 1e-20 : 1));
    for (int i = 0; i < MOST; i++) quantize(xq, i, x + i * wide, cols);
    for (int n = 1; n <= MOST; n += n < 17 ? 1 : MOST - 17) {
        memset(y, 0xff, (size_t)(MOST * stride) * 4);
        rows_plain(&w, 0, rows, x, wide, xq, n, y, stride);
        for (int step = 16; step <= 64; step *= 2) {  // one panel at a time, two or four
            memset(fast, 0xff, (size_t)(MOST * stride) * 4);
            for (int first = 0; first < rows; first += step)
                rows_fast(&w, first, step < rows - first ? step : rows - first, x, wide, xq, n,
                          fast + first, stride);
            differ += memcmp(y, fast, (size_t)(MOST * stride) * 4) != 0;  // nor is more written
        }
    }
    for (int i = 0; i < MOST; i++) {
        double size = 0;
        for (int c = 0; c < cols; c++)
            in[c] = (double)x[i * wide + c], size = worse(size, fabs(in[c]));
        times(out, &t, in);
        for (int r = 0; r < rows; r++)
            worst = worse(worst, fabs((double)y[i * stride + r] - out[r]) / size);
    }
    // Sums as large as they get: no partial sum may overflow.
    size_t scales = dtype == Q4A ? 64 : 32, block = scales + (dtype == Q8 ? 512 : 256);
    for (int sign = -1; sign <= 1 && dtype >= Q8; sign += 2) {
        for (size_t i = 0; i < t.n; i++)
            if (i % block >= scales) t.bytes[i] = dtype == Q8 ? (uint8_t)(sign * 127) : 0xff;
        for (int i = 0; i < MOST * wide; i++) x[i] = (float)sign;
        for (int i = 0; i < MOST; i++) quantize(xq, i, x + i * wide, cols);
        for (int p = 0, n = 1; n <= MOST; p = (p + 1) % panels, n += n < 9 ? 8 : MOST - 9) {
            int some = rows - p * 16 < 16 ? rows - p * 16 : 16;
            rows_plain(&w, p * 16, some, x, wide, xq, n, y, stride);
            rows_fast(&w, p * 16, some, x, wide, xq, n, fast, stride);
            for (int i = 0; i < n; i++) differ += memcmp(y + i * stride, fast + i * stride, 4) != 0;
        }
    }
    CHECK(worst < (dtype >= Q8 ? 2e-5 : 1e-5), "%s %d x %d times x is right: off by %g",
          formats[dtype], rows, cols, worst);
    CHECK(!differ, "%s %d x %d: the fast product has the plain one's bits: %d differ",
          formats[dtype], rows, cols, differ);
    free(space.q);
    free_tensor(&t);
    free(x), free(y), free(fast), free(in), free(out);
}

static void test_products(void) {
    static const int rows[] = {1, 15, 16, 17, 33, 64, 130};
    static const int cols[] = {1, 2, 31, 32, 33, 50, 100, 2117};
    for (int dtype = ROWS; dtype <= Q4A; dtype++)
        for (int i = 0; i < 7; i++)
            for (int j = 0; j < 8; j++) if (j < 7 || i == 3) test_product(dtype, rows[i], cols[j]);
}

// =================================================================================================
// 3. Attention
// =================================================================================================

// A cache of random keys and values: the trunk, and branches that leave it at from[1..], `length`
// positions long, of which the newest `seen` can be seen (0: all).
typedef struct {
    int head_dim, group, kv_heads, window;
    int dtype;  // of the embedding, and so of keys and values
    int branch_at, seen, length;
    int layer;  // of two; the first sees a third of `seen`
} AttentionCase;
static const char *describe(const AttentionCase *a) {
    static char text[160];
    snprintf(text, sizeof text,
             "head size %d, %d queries a head, window %d, %s, branch at %d, %d of %d seen",
             a->head_dim, a->group, a->window, formats[a->dtype], a->branch_at, a->seen,
             a->length);
    return text;
}

// A number that the cache of a model of this dtype holds exactly: in half precision, or rounded to
// int8, which finds this scale, a power of two, in the block.
static float representable(int dtype, double x, int d, float scale) {
    if (dtype == BF16) return (float)half_value(nearest_half(x));
    if (dtype == F32) return (float)x;
    int q = d % 32 ? (int)(x * 32) : 127;
    return (float)(q < -127 ? -127 : q > 127 ? 127 : q) * scale;
}
// A number of the key (what = 0) or value (1) at a sequence's position: a function of its place.
static float stored(int dtype, int seq, int from, int pos, int head, int d, int what) {
    uint64_t place = (uint64_t)(((seq && pos >= from ? seq : 0) * 2048 + pos) * 8 + head) * 512 +
                     (uint64_t)(d * 2 + what);
    uint64_t keep = random_state;
    random_state = place * 77;
    double x = spread();
    random_state = keep;
    int which = pos * 3 + head + (what ? 0 : d / 32) + (pos >= from ? seq : 0);
    float scale = which % 4 ? 1.0f / 64 : 1.0f / 32;
    return representable(dtype, x, d, scale);
}

static void test_attention_case(const AttentionCase *a) {
    enum { CONTEXT = 640, MOST = 1200 };
    Model m = {.c = {.n_heads = a->group * a->kv_heads, .n_kv_heads = a->kv_heads,
                     .head_dim = a->head_dim, .n_layers = 2, .sliding_window = a->window,
                     .attn_scale = 0.4f, .dim = 1, .hidden_dim = 1,
                     .local_layers = {3}},
               .token_embedding = {.dtype = a->dtype}};
    int layer = a->layer, sees = layer ? a->seen : (a->seen + 2) / 3;
    const Config *c = &m.c;
    Cache kv;
    new_cache(&kv, &m, CONTEXT, 2, a->seen ? a->seen + MAX_BATCH : a->length);
    memset(kv.data, 0xff, kv.bytes);  // what lies beside the keys and values must not matter
    memset(kv.branches, 0xff, 2 * kv.branch_bytes);
    kv.window = a->seen;
    kv.from[1] = a->branch_at;
    kv.from[2] = a->branch_at ? a->branch_at - 1 : 3;
    for (int seq = 0; seq < 3; seq++)
        for (int pos = seq ? kv.from[seq] : 0;
             pos < (seq ? kv.from[seq] + a->length : CONTEXT); pos++)
            for (int h = 0, at; h < a->kv_heads; h++) {
                float kv_numbers[2][256];
                for (int d = 0; d < 2 * a->head_dim; d++)
                    kv_numbers[d % 2][d / 2] =
                        stored(a->dtype, seq, kv.from[seq], pos, h, d / 2, d % 2);
                uint8_t *chunk = cache_chunk(&kv, seq, pos, layer, h, &at);
                cache_put(&kv, chunk, at, kv_numbers[0], kv_numbers[1]);
            }
    // Runs of positions of all three sequences; those of the branches start where these do, or
    // where there is more than can be seen.
    int late = a->seen ? a->length - 60 : 0, one = kv.from[1] + late, two = kv.from[2] + late;
    int starts[][3] = {{0, 0, 9}, {0, 14, 4}, {0, 250, 13}, {0, 509, 5}, {0, 623, 1},
                       {1, one, 20}, {1, one + 57, 3}, {2, two, 1}, {2, two + 16, 2}};
    Slot batch[MAX_BATCH];
    int n = 0, hd = a->head_dim, q_dim = c->n_heads * hd;
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < starts[i][2]; j++)
            batch[n++] = (Slot){0, starts[i][1] + j, starts[i][0], true};
    State *s = get_state(&kv, n);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < q_dim; j++)
            row_of(s->q, i, q_dim)[j] =
                representable(a->dtype == Q8 ? Q8 : F32, spread(), j % hd, 1.0f / 64);

    double worst = 0, *p = get(MOST, 8), *scale = get(MOST, 8);
    for (int i = 0; i < n; i += 1 + i / 7) {
        int h = below(c->n_heads), pos = batch[i].pos, seq = batch[i].seq, from = kv.from[seq];
        int first = a->window && pos >= a->window ? pos - a->window + 1 : 0;
        int end = a->seen ? pos + 1 - sees : 0;  // of what is seen no more after `from`
        double total = 0;
        float weights[MOST], out[512];
        const float *q = row_of(s->q, i, q_dim) + h * hd;
        Quantized rounded = new_quantized(1, hd);
        quantize(&rounded, 0, q, hd);
        attend_plain(&kv, layer, &batch[i], h, q, &rounded, weights, out);
        free(rounded.q);
        for (int t = first; t <= pos; t++) {
            p[t] = 0;
            if (t >= from && t < end) continue;
            for (int d = 0; d < hd; d++)
                p[t] += (double)q[d] * (double)stored(a->dtype, seq, from, t, h / a->group, d, 0);
            total += p[t] = exp(p[t] * (double)c->attn_scale);
        }
        for (int t = 0; t <= pos; t++) {  // the first number of int8 values is 127 * scale
            double value = (double)stored(a->dtype, seq, from, t, h / a->group, 0, 1);
            scale[t] = a->dtype == Q8 ? fabs(value) / 127 : 1;
            p[t] = t < first ? 0 : p[t] / total * scale[t];
        }
        if (a->dtype == Q8) round_activations(p, pos + 1, 16, false);
        for (int d = 0; d < hd; d++) {
            double expected = 0;
            for (int t = first; t <= pos; t++)
                expected += p[t] / scale[t] *
                            (double)stored(a->dtype, seq, from, t, h / a->group, d, 1);
            worst = worse(worst, fabs(expected - (double)out[d]));
        }
    }
    free(p), free(scale);
    CHECK(worst < 2e-5, "attention is the average of values by softmax(q k): off by %g (%s)", worst,
          describe(a));

    size_t size = (size_t)n * (size_t)padded(q_dim) * sizeof(float);
    float *plain = get(size, 1);
    Pass f = {.m = &m, .kv = &kv, .s = s, .batch = batch, .n = n, .layer = layer};
    for (int threads = 1; threads <= 3; threads += 2)
        for (int pieces = 0; pieces < 3; pieces++) {  // all at once, or a few slots at a time
            set_threads(threads);
            kv.plain = true;
            f.n = n, f.batch = batch, s->q = f.s->q;
            attention(&f);
            memcpy(plain, s->att_out, size);
            memset(s->att_out, 0, size);
            kv.plain = false;
            if (pieces == 0) attention(&f);
            int differ = 0;
            // at the front of the arrays, as forward does
            for (int i = 0, some; i < n && pieces; i += some) {
                some = pieces == 1 ? 1 : 1 + below(9);
                some = some < n - i ? some : n - i;
                State part = *s;
                part.q = row_of(s->q, i, q_dim), part.att_out = row_of(s->att_out, i, q_dim);
                Pass g = f;
                g.s = &part, g.batch = batch + i, g.n = some;
                attention(&g);
                s->scores = part.scores, s->scores_capacity = part.scores_capacity;
            }
            for (int i = 0; i < n; i++)
                differ += memcmp(row_of(plain, i, q_dim), row_of(s->att_out, i, q_dim),
                                 (size_t)q_dim * 4) != 0;
            CHECK(!differ,
                  "fast attention has the plain one's bits: %d of %d slots differ (%s, %d threads)",
                  differ, n, describe(a), threads);
        }
    set_threads(1);
    // Scores that are infinite make numbers that are NaN, of either sign: forward must see these.
    int nans[2] = {0}, differ = 0;
    for (int i = 0; i < n * padded(q_dim); i++) f.s->q[i] = i % 3 ? 3e38f : -3e38f;
    for (int fast = 0; fast < 2; fast++) {
        kv.plain = !fast, f.n = n, f.batch = batch;
        attention(&f);
        for (int i = 0; i < n * q_dim; i++) {
            size_t at = (size_t)(i / q_dim) * (size_t)padded(q_dim) + (size_t)(i % q_dim);
            nans[fast] += isnan(s->att_out[at]);
            if (fast) differ += isnan(s->att_out[at]) != isnan(plain[at]);
            else plain[at] = s->att_out[at];
        }
    }
    CHECK(!differ && nans[0], "infinite scores: %d numbers are NaN, fast attention's %d (%s)",
          nans[0], nans[1], describe(a));
    free(plain);
    free_cache(&kv);
}

static void test_attention(void) {
    static const int places[] = {0, 1, 15, 16, 17, 40, 255, 256, 257};
    static const int sizes[] = {2, 12, 16, 24, 64, 80, 130, 12, 16};
    static const int groups[] = {1, 3, 5, 2, 4, 9, 1, 40, 8};
    static const int windows[] = {0, 1, 7, 300, 16, 0, 257, 0, 100}, seen[] = {300, 1, 16, 100, 30};
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 3; j++) {
            AttentionCase a = {sizes[i], groups[(i + j) % 9], 1 + i % 2, windows[(i + 4 * j) % 9],
                               (int[]){BF16, F32, Q8}[j], places[i], 0, 60, j % 2};
            test_attention_case(&a);
            a.seen = seen[(i + 4 * j) % 5];
            a.length = i % 2 ? 900 : a.seen + 60;  // the ring is used again, or the gap is new
            test_attention_case(&a);
            a.layer ^= 1;
            test_attention_case(&a);
        }
    for (int many = MAX_BATCH; many < MAX_BATCH + 2; many++)
        test_attention_case(&(AttentionCase){2, many, 1, 0, Q8, 17, 0, 60, 0});
}

// =================================================================================================
// 4. forward
// =================================================================================================

static int *random_ids(int n, int vocab) {
    int *ids = get((size_t)n, sizeof *ids);
    for (int i = 0; i < n; i++) ids[i] = below(vocab);
    return ids;
}

static void test_against_reference(const Made *made, const Model *m) {
    enum { N = 40 };
    int vocab = made->s.vocab, *ids = random_ids(N, vocab);
    double *expected = get((size_t)(N * vocab), 8), worst = 0, mean = 0, square = 0;
    reference(made, ids, N, expected, NULL);
    Cache kv;
    new_cache(&kv, m, N, 0, 0);
    Slot batch[N];
    for (int i = 0; i < N; i++) batch[i] = (Slot){ids[i], i, 0, true};
    const float *logits = forward(m, &kv, batch, N);
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
          "%s %s computes what the second transformer does: off by %g, on average %g (size %g)",
          made->s.name, formats[made->s.dtype], worst, mean, sqrt(square));
    free_cache(&kv);
    free(expected);
    free(ids);
}

// The logits of every position do not depend on how the work is cut and dealt out.
static void test_same_bytes(const Made *made, const Model *m) {
    enum { N = 300 };
    int vocab = m->c.vocab_size, *ids = random_ids(N, vocab), *others = random_ids(2 * N, vocab),
        wrong = 0;
    size_t row = (size_t)vocab * sizeof(float);
    float *expected = get(N, row);
    Cache kv;
    new_cache(&kv, m, N, 0, 0);
    kv.plain = true;
    for (int i = 0; i < N; i++)
        memcpy(expected + i * vocab, forward(m, &kv, &(Slot){ids[i], i, 0, true}, 1), row);
    free_cache(&kv);
    for (int round = 0; round < 6; round++) {
        new_cache(&kv, m, N, 2, N);  // sequences 1 and 2 are there to be in the way
        kv.plain = round == 0;
        set_threads(round % 2 ? 3 : 1);
        int at[3] = {0}, others_too = round >= 2;
        while (at[0] < N) {
            Slot batch[2 * N];
            int n = 0, most = round == 5 ? 2 * N : 1 + below(round == 4 ? 5 : 150);
            int wanted = 0, positions[2 * N];
            while (n < most && at[0] < N) {
                int seq = others_too ? below(3) : 0, run = 1 + below(20);
                for (; run-- && n < most && at[seq] < N; at[seq]++) {
                    bool want = below(3) > 0;
                    if (want) positions[wanted++] = seq ? -1 : at[0];
                    batch[n++] = (Slot){seq ? others[(seq - 1) * N + at[seq]] : ids[at[0]], at[seq],
                                        seq, want};
                }
            }
            const float *logits = forward(m, &kv, batch, n);
            for (int i = 0; i < wanted; i++)
                if (positions[i] >= 0)
                    wrong += memcmp(logits + i * vocab, expected + positions[i] * vocab, row) != 0;
        }
        free_cache(&kv);
        CHECK(!wrong, "%s %s: the same logits however the batch is cut, %s, %d threads: %d differ",
              made->s.name, formats[made->s.dtype], kv.plain ? "plain" : "fast", round % 2 ? 3 : 1,
              wrong);
    }
    set_threads(1);
    free(expected), free(ids), free(others);
}

// A branch of a cache is a sequence of its own that shares the trunk's beginning.
static void test_branches(const Made *made, const Model *m, int place) {
    enum { EXTRA = 34, MOST = 300 };
    int vocab = m->c.vocab_size, *trunk = random_ids(MOST, vocab),
        *own = random_ids(3 * EXTRA, vocab), wrong = 0;
    size_t row = (size_t)vocab * sizeof(float);
    float *expected[3];
    Slot batch[MOST];
    Cache kv;
    for (int s = 0; s < 3; s++) {  // sequence 0 is the trunk itself, which goes on too
        new_cache(&kv, m, place + EXTRA, 0, 0);
        for (int i = 0; i < place + EXTRA; i++)
            batch[i] = (Slot){i < place ? trunk[i] : own[s * EXTRA + i - place], i, 0, i >= place};
        expected[s] = get(EXTRA, row);
        memcpy(expected[s], forward(m, &kv, batch, place + EXTRA), EXTRA * row);
        free_cache(&kv);
    }
    new_cache(&kv, m, place + EXTRA, 2, EXTRA);
    kv.from[1] = kv.from[2] = place;
    set_threads(place % 2 ? 1 : 3);
    for (int i = 0; i < place; i++) batch[i] = (Slot){trunk[i], i, 0, false};
    if (place) forward(m, &kv, batch, place);
    for (int i = 0, some; i < EXTRA; i += some) {
        int n = 0;
        some = 1 + below(12);
        some = some < EXTRA - i ? some : EXTRA - i;
        for (int s = 0; s < 3; s++)
            for (int j = i; j < i + some; j++)
                batch[n++] = (Slot){own[s * EXTRA + j], place + j, s, true};
        const float *logits = forward(m, &kv, batch, n);
        for (int s = 0; s < 3; s++)
            wrong +=
                memcmp(logits + s * some * vocab, expected[s] + i * vocab, (size_t)some * row) != 0;
    }
    CHECK(!wrong, "%s %s: branches at %d compute what sequences of their own do: %d parts differ",
          made->s.name, formats[made->s.dtype], place, wrong);
    set_threads(1);
    free_cache(&kv);
    for (int s = 0; s < 3; s++) free(expected[s]);
    free(trunk), free(own);
}

static void test_forward(void) {
    static const int places[] = {0, 1, 15, 16, 17, 40, 255, 256, 257};
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            Shape s = family(which, dtype);
            if ((which + dtype) % 2) s.embedding = F32;  // then the cache is float32 too
            Made made = make_weights(&s);
            Model m = open_made(&made, "forward.bin");
            test_against_reference(&made, &m);
            if (which == LLAMA || which == GEMMA || dtype == F32 + which)
                test_same_bytes(&made, &m);
            for (int i = 0; i < 9; i++)
                if ((i + which * 5 + dtype) % 4 == 0 || (which == GEMMA && dtype <= BF16))
                    test_branches(&made, &m, places[i]);
            free_model(&m);
            free_made(&made);
        }
    for (int version = 0; version < 2; version++)
        for (int tied = 0; tied < 2; tied++) {
            Shape s = family(LLAMA, ROWS);
            s.name = version ? "version 1" : "version 0";
            s.flags = tied ? TIED_EMBEDDING : 0;
            Made made = make_weights(&s);
            Buffer b = llama2c_file(&made, version);
            Model m;
            load_model(&m, save("llama2c.bin", b.p, b.n));
            CHECK(!!(m.c.flags & TIED_EMBEDDING) == tied, "%s knows whether it is tied", s.name);
            test_against_reference(&made, &m);
            if (tied == version) test_same_bytes(&made, &m);
            test_branches(&made, &m, 17);
            free(b.p);
            free_model(&m);
            free_made(&made);
        }
}

// The bytes are not only equal within a build: these are the hashes that every build must give.
static void test_one_hash(void) {
    static const uint64_t expected[N_FAMILIES][5] = {
        {0xf08751220fb70102, 0xa63b11c5c52b739f, 0x5fbac05074536a4a,
         0xd4eecf8fa3eef0b9, 0x67d1801a51b3044d},
        {0x100cc0d775cd45a2, 0x59a781e316b89637, 0xb5e8d346844c8d49,
         0x9447d026ac5d40b0, 0x28a933d7059ba94d},
        {0x470abff88ef6c643, 0x2373650bb220abd6, 0xc0b199b7baf9bc7c,
         0x9b4cd66cfe1ea288, 0xa2b723c9464dbdf3},
        {0xc5246bc12da0c1cc, 0xeff01d9d3674ef99, 0x0301c3f772877fcf,
         0xb2e6b2a22beca4e3, 0x6695f43aebc8850e},
    };
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            enum { N = 70 };
            random_state = (uint64_t)(1000 + which * 10 + dtype);
            Shape s = family(which, dtype);
            Made made = make_weights(&s);
            Model m = open_made(&made, "hash.bin");
            int *ids = random_ids(N, m.c.vocab_size);
            Slot batch[N];
            for (int i = 0; i < N; i++) batch[i] = (Slot){ids[i], i, 0, true};
            Cache kv;
            new_cache(&kv, &m, N, 0, 0);
            size_t bytes = (size_t)(N * m.c.vocab_size) * sizeof(float);
            unsigned long long hash = hash64(forward(&m, &kv, batch, N), bytes);
            CHECK(hash == expected[which][dtype - F32], "%s %s: logits of hash 0x%016llx in %s",
                  s.name, formats[dtype], hash, isa);
            free_cache(&kv);
            free_model(&m);
            free_made(&made);
            free(ids);
        }
}

// =================================================================================================
// 5. The sampler
// =================================================================================================

// llama2.c's rule in its own words: a coin in [0, 1) from xorshift*; without top-p, the first token
// at which the running sum of probabilities exceeds the coin; with it, the same over the likeliest
// tokens, the fewest whose sum exceeds top_p, with the coin scaled to that sum. *margin: how near
// the decision was.
static int draw(const double *p, int n, double top_p, int top_k, double min_p, double coin,
                double *margin) {
    int order[400], used = n;
    bool nucleus = top_p > 0 && top_p < 1, sorted = nucleus || top_k || min_p > 0;
    for (int i = 0; i < n; i++) {
        int j = i;
        for (; sorted && j && p[order[j - 1]] < p[i]; j--) order[j] = order[j - 1];
        order[j] = i;
    }
    *margin = 1;
    if (top_k && used > top_k) used = top_k;
    double sum = 0;
    for (int i = 0; i < used && sorted; i++) {
        if (min_p > 0 && i) *margin = fmin(*margin, fabs(p[order[i]] - min_p * p[order[0]]));
        if (min_p > 0 && i && p[order[i]] < min_p * p[order[0]]) used = i;
        else {
            sum += p[order[i]];
            if (nucleus) *margin = fmin(*margin, fabs(sum - top_p));
            if (nucleus && sum > top_p) used = i + 1;
        }
    }
    double r = sorted ? coin * sum : coin, cdf = 0;
    for (int i = 0; i < used; i++) {
        cdf += p[order[i]];
        *margin = fmin(*margin, fabs(r - cdf));
        if (r < cdf) return order[i];
    }
    return order[used - 1];
}

static Sampler sampler_for(int n, double temperature, double top_p, uint64_t seed) {
    Sampler s = {.temperature = (float)temperature, .top_p = (float)top_p, .repeat_penalty = 1,
                 .rng = seed,
                 .vocab_size = n};
    s.p = get((size_t)n, sizeof *s.p);
    s.candidates = get((size_t)n, sizeof *s.candidates);
    return s;
}
static void free_sampler(Sampler *s) { free(s->p); free(s->candidates); }

static void test_draws(double temperature, double top_p, int top_k, double min_p) {
    enum { N = 200, DRAWS = 400 };
    float logits[N];
    double p[N];
    int wrong = 0, close = 0;
    for (int i = 0; i < DRAWS; i++) {
        uint64_t state = 1 + rnd() % 1000000;
        if (i == 0) state = UINT64_MAX;
        Sampler s = sampler_for(N, temperature, top_p, state);
        s.top_k = top_k, s.min_p = (float)min_p;
        for (int step = 0; step < 3; step++) {
            double most = -1e9, sum = 0, margin;
            for (int j = 0; j < N; j++) logits[j] = (float)(3 * spread());
            for (int j = 0; j < N; j++) most = worse(most, (double)logits[j]);
            for (int j = 0; j < N; j++) sum += p[j] = exp(((double)logits[j] - most) / temperature);
            for (int j = 0; j < N; j++) p[j] /= sum;
            state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
            double coin = (double)(uint32_t)(state * 0x2545F4914F6CDD1Du >> 32 >> 8) / 16777216;
            int expected = draw(p, N, top_p, top_k, min_p, coin, &margin),
                got = sample(&s, logits, NULL, 0);
            if (margin < 2e-6) close++;
            else wrong += got != expected;
        }
        free_sampler(&s);
    }
    CHECK(!wrong && close < DRAWS / 4,
          "draws at temperature %g, top-p %g, top-k %d, min-p %g are llama2.c's: "
          "%d of %d are not",
          temperature, top_p, top_k, min_p, wrong, 3 * DRAWS);
}

static void test_sampler(void) {
    static const double temperatures[] = {0.3, 0.8, 1, 2}, top_ps[] = {0, 0.1, 0.5, 0.9, 0.99, 1};
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 6; j++) test_draws(temperatures[i], top_ps[j], 0, 0);
    for (int k = 1; k < 40; k += 6) test_draws(1, k % 4 ? 0.95 : 1, k, 0);
    test_draws(1, 1, 0, 0.05), test_draws(0.7, 0.9, 0, 0.2), test_draws(1.5, 0.9, 20, 0.01),
        test_draws(1, 0, 0, 1);

    float logits[100] = {0};
    Sampler s = sampler_for(100, 0, 0.9, 7);
    uint64_t before = s.rng;
    logits[40] = logits[41] = logits[99] = 2;
    CHECK(sample(&s, logits, NULL, 0) == 40 && s.rng == before,
          "temperature 0 takes the likeliest, of ties the lowest");
    CHECK(!memcmp(s.p, logits, sizeof logits), "and leaves the logits in p, which explain shows");
    s.temperature = 1e-10f;
    int others = 0, worst = 0;
    logits[41] = logits[99] = 1.999f;
    for (int i = 0; i < 500; i++) others += sample(&s, logits, NULL, 0) != 40;
    CHECK(!others, "temperature 1e-10 takes the likeliest too");
    s.temperature = 1e10f, s.top_p = 1;
    int counts[100] = {0};
    for (int i = 0; i < 10000; i++) counts[sample(&s, logits, NULL, 0)]++;
    for (int i = 0; i < 100; i++)
        worst = abs(counts[i] - 100) > worst ? abs(counts[i] - 100) : worst;
    CHECK(worst < 50, "temperature 1e10 draws all tokens alike: one is off by %d of 100", worst);

    for (int i = 0; i < 100; i++) logits[i] = 0.5f;
    s.temperature = 1, s.top_p = 1e-6f, others = 0;
    for (int i = 0; i < 500; i++) others += sample(&s, logits, NULL, 0) != 0;
    CHECK(!others, "a tiny top-p of a uniform distribution leaves the first token");
    s.top_p = 1, s.top_k = 3, others = 0;
    for (int i = 0; i < 500; i++) others += sample(&s, logits, NULL, 0) > 2;
    CHECK(!others, "of equal tokens top-k takes the lowest ids");
    s.top_k = 1000;
    for (int i = 0; i < 500; i++) others += sample(&s, logits, NULL, 0) > 50;
    CHECK(others > 150, "a top-k beyond the vocabulary is off");

    int text[] = {3, 3, 7};
    s = (free_sampler(&s), sampler_for(100, 0, 1, 1));
    for (int i = 0; i < 100; i++) logits[i] = -5;
    logits[3] = 2, logits[4] = 1.5f, logits[7] = -1;
    s.repeat_penalty = 1.3f;
    CHECK(sample(&s, logits, text, 3) == 3, "a repetition is counted once: 2 / 1.3 is above 1.5");
    s.repeat_penalty = 1.5f;
    CHECK(sample(&s, logits, text, 3) == 4, "a repeated token with a positive logit is divided");
    logits[3] = logits[4] = -5, logits[8] = -1.4f;
    CHECK(sample(&s, logits, text, 3) == 8, "a repeated token with a negative logit is multiplied");
    s.repeat_penalty = 1;
    CHECK(sample(&s, logits, text, 3) == 7, "a penalty of 1 is off");
    free_sampler(&s);

    enum { N = 20, DRAWS = 40000 };
    for (int top = 0; top < 2; top++) {  // with a top-p that excludes nothing, the sorted path
        int count[N] = {0};
        double p[N], sum = 0, chi = 0;
        s = sampler_for(N, 0.7, top ? 0.99999 : 1, 12345);
        for (int i = 0; i < N; i++) logits[i] = (float)(1.2 * spread());
        for (int i = 0; i < N; i++) sum += p[i] = exp((double)logits[i] / 0.7);
        for (int i = 0; i < DRAWS; i++) count[sample(&s, logits, NULL, 0)]++;
        for (int i = 0; i < N; i++)
            chi += pow(count[i] - DRAWS * p[i] / sum, 2) / (DRAWS * p[i] / sum);
        CHECK(chi < 50, "draws follow the softmax: chi-square %g with 19 degrees of freedom", chi);
        free_sampler(&s);
    }
}

// =================================================================================================
// 6. The tokenizer
// =================================================================================================

typedef struct {
    int kind, bos, eos, unk, flags, split, digits, isolate;
    float temperature, top_p;
    int n, n_merges, n_ranges, n_stops, n_chat;
    Buffer tokens, merges, ranges, stops, chat;
    char texts[2000][12];  // the first bytes of each token
    int lens[2000];
} Vocabulary;

static Vocabulary *new_vocabulary(int kind) {
    Vocabulary *v = get(1, sizeof *v);
    v->kind = kind, v->bos = v->eos = v->unk = -1, v->temperature = v->top_p = -1;
    return v;
}
static int token(Vocabulary *v, const char *text, size_t len, double score, int type) {
    float f = (float)score;
    put(&v->tokens, &f, 4);
    put(&v->tokens, (uint8_t[]){(uint8_t)type, 0, (uint8_t)len, (uint8_t)(len >> 8)}, 4);
    put(&v->tokens, text, len);
    memcpy(v->texts[v->n], text, len < 12 ? len : 12);
    v->lens[v->n] = (int)len;
    return v->n++;
}
static void all_bytes(Vocabulary *v) {
    for (int i = 0; i < 256; i++)
        token(v, &(char){(char)i}, 1, 0, v->kind == BYTE_LEVEL ? NORMAL : BYTE);
}
static void merge(Vocabulary *v, int a, int b) {
    put32(&v->merges, a), put32(&v->merges, b);
    v->n_merges++;
}
static void some_ranges(Vocabulary *v) {
    static const uint32_t ranges[][3] = {
        {9, 13, 3}, {32, 32, 3}, {48, 57, 2}, {65, 90, 1}, {97, 122, 1}, {0x85, 0x85, 3},
        {0xa0, 0xa0, 3}, {0xb2, 0xb3, 2}, {0xc0, 0xd6, 1}, {0xd8, 0xf6, 1}, {0xf8, 0x2c1, 1},
        {0x400, 0x481, 1}, {0x660, 0x669, 2}, {0x3000, 0x3000, 3}, {0x4e00, 0x9fff, 1}};
    put(&v->ranges, ranges, sizeof ranges);
    v->n_ranges = (int)(sizeof ranges / sizeof *ranges);
}
static void chat_piece(Vocabulary *v, const char *s) {
    put32(&v->chat, (int)strlen(s));
    put(&v->chat, s, strlen(s));
    v->n_chat++;
}
static Buffer tokenizer_file(const Vocabulary *v) {
    Buffer b = {0};
    int head[] = {0x336b6f74, 1, 0, 0, v->kind, v->n, v->bos, v->eos, v->unk, v->flags,
                  v->split | v->digits << 8 | v->isolate << 16, v->n_merges, v->n_ranges,
                  v->n_stops, v->n_chat};
    put(&b, head, sizeof head);
    put(&b, &v->temperature, 4), put(&b, &v->top_p, 4);
    put(&b, NULL, 80 - b.n);
    put(&b, v->tokens.p, v->tokens.n);
    align(&b, 4);
    const Buffer *rest[] = {&v->merges, &v->ranges, &v->stops, &v->chat};
    for (int i = 0; i < 4; i++) if (rest[i]->n) put(&b, rest[i]->p, rest[i]->n);
    set64(b.p + 8, hash_of(b.p + 16, b.n - 16));
    return b;
}
static void free_vocabulary(Vocabulary *v) {
    free(v->tokens.p), free(v->merges.p), free(v->ranges.p), free(v->stops.p), free(v->chat.p),
        free(v);
}
static Tokenizer open_tokenizer(const Vocabulary *v, const char *name) {
    Buffer b = tokenizer_file(v);
    Tokenizer t;
    static Model m;
    m = (Model){.c = {.vocab_size = v->n, .tokenizer_hash = hash_of(b.p + 16, b.n - 16)}};
    const char *wrong = load_tokenizer(&t, save(name, b.p, b.n), &m);
    CHECK(!wrong, "a tokenizer made here opens: it %s", wrong);
    if (wrong) exit(1);
    free(b.p);
    return t;
}

static Ids ids_of(const Tokenizer *t, const char *s, size_t n, const char *typed, bool bos) {
    Ids ids = {0};
    encode(t, (Text){s, n}, typed, bos, &ids);
    return ids;
}
static bool equal_ids(const Ids *a, const int *b, size_t n) {
    return a->n == n && (!n || !memcmp(a->ids, b, n * sizeof *b));
}
// The ids of a text as a string, for comparing and for showing.
static const char *shown(const Tokenizer *t, const char *s, const char *typed, bool bos) {
    static char text[2000];
    Ids ids = ids_of(t, s, strlen(s), typed, bos);
    int used = text[0] = 0;
    for (size_t i = 0; i < ids.n && used < 1900; i++)
        used += snprintf(text + used, 20, "%s%d", i ? " " : "", ids.ids[i]);
    free(ids.ids);
    return text;
}
static bool round_trips(const Tokenizer *t, const char *s, size_t n) {
    Ids ids = ids_of(t, s, n, NULL, false);
    Buffer b = {0};
    for (size_t i = 0; i < ids.n; i++) {
        Text text = decode(t, i ? ids.ids[i - 1] : -1, ids.ids[i]);
        put(&b, text.s, text.len);
    }
    bool same = b.n == n && (!n || !memcmp(b.p, s, n));
    free(b.p), free(ids.ids);
    return same;
}

// Words as the regular expressions of GPT-2 and cl100k cut them; the bars were checked with a
// regular expression library. Every expected word is a token, taken whole: a wrong cut shows.
static void test_words(void) {
    static const char *const cases[3][14] = {
        {"we|'ve| it|'s| I|'|LL| CAN|'|T| '|tis| o|'|clock",
         " | two| | spaces|  | and|\t|tab| \n\n|\n|lines|  \n", "1234567| x|1|y| 12|ab",
         "caf\xc3\xa9| n\xc3\xa4|\xc2\xa0|\xc2\xa0|\xd1\x81\xd0\xbb| \xe4\xb8\xad\xe6\x96\x87|!?",
         "...!!|\r\n\r\n | end|\r\n", " '|S|''|ve|'re|'re| '|llama",
         "a|\xe3\x80\x80|b| \xe3\x80\x80| c|\xd9\xa1\xd9\xa2| \xd9\xa1", "--|x|\n\n| --|\n| x",
         "\n", " ", "x| | 1| | 2| !", "a|\xff\xe0\x81\x81\xc3| b|\x80",
         "'|quoted|'", "'ll|'d|'|LLama|'"},
        {"we|'ve| it|'s| I|'|LL| CAN|'|T| '|tis| o|'|clock",
         " | two| | spaces|  | and|\t|tab| \n\n|\n|lines|  \n", "1|2|3|4|5|6|7| x|1|y| |1|2|ab",
         "caf\xc3\xa9| n\xc3\xa4|\xc2\xa0|\xc2\xa0|\xd1\x81\xd0\xbb| \xe4\xb8\xad\xe6\x96\x87|!?",
         "...!!|\r\n\r\n | end|\r\n", " '|S|''|ve|'re|'re| '|llama",
         "a|\xe3\x80\x80|b| \xe3\x80\x80| c|\xd9\xa1|\xd9\xa2| |\xd9\xa1", "--|x|\n\n| --|\n| x",
         "\n", " ", "x|  |1|  |2| !", "a|\xff\xe0\x81\x81\xc3| b|\x80",
         "'|quoted|'", "'ll|'d|'|LLama|'"},
        {"we|'ve| it|'s| I|'LL| CAN|'T| '|tis| o|'clock",
         " | two| | spaces|  | and|\ttab| \n\n\n|lines|  \n", "123|456|7| x|1|y| |12|ab",
         "caf\xc3\xa9| n\xc3\xa4|\xc2\xa0|\xc2\xa0\xd1\x81\xd0\xbb| \xe4\xb8\xad\xe6\x96\x87|!?",
         "...!!\r\n\r\n| | end|\r\n", " '|S|''|ve|'re|'re| '|llama",
         "a|\xe3\x80\x80"
         "b| \xe3\x80\x80| c|\xd9\xa1\xd9\xa2| |\xd9\xa1",
         "--|x|\n\n| --\n| x", "\n", " ", "x| | |1| | |2| !", "a|\xff\xe0\x81\x81\xc3| b|\x80",
         "'quoted|'", "'ll|'d|'LL|ama|'"}};
    for (int rule = 0; rule < 3; rule++) {
        Vocabulary *v = new_vocabulary(BYTE_LEVEL);
        v->split = rule == 2 ? 2 : 1, v->isolate = rule == 1, v->digits = rule == 2 ? 3 : 0,
        v->flags = IGNORE_MERGES;
        all_bytes(v);
        some_ranges(v);
        for (int i = 0; i < 14; i++)
            for (const char *p = cases[rule][i], *end; *p; p = end + (*end == '|')) {
                end = p + strcspn(p, "|");
                if (end - p > 1) token(v, p, (size_t)(end - p), 0, NORMAL);
            }
        Tokenizer t = open_tokenizer(v, "words.tok");
        for (int i = 0; i < 14; i++) {
            char text[200], cut[200];
            size_t n = 0, used = 0;
            for (const char *p = cases[rule][i]; *p; p++) if (*p != '|') text[n++] = *p;
            Ids ids = ids_of(&t, text, n, NULL, true);
            for (size_t j = 0; j < ids.n && used < 180; j++) {
                const Text *word = &t.tokens[ids.ids[j]].text;
                if (j) cut[used++] = '|';
                memcpy(cut + used, word->s, word->len);
                used += word->len;
            }
            size_t bars = strlen(cases[rule][i]);
            if (cases[rule][i][bars - 1] == '|') bars--;
            CHECK(used == bars && !memcmp(cut, cases[rule][i], bars),
                  "rule %d cuts %s as it should: %.*s", rule, cases[rule][i], (int)used, cut);
            free(ids.ids);
        }
        free_tokenizer(&t);
        free_vocabulary(v);
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
            double priority = -1e9;
            float score = 0;
            if (v->kind == BYTE_LEVEL) {
                for (int k = v->n_merges; k--;)
                    if ((int)read_u32(v->merges.p + 8 * k) == a &&
                        (int)read_u32(v->merges.p + 8 * k + 4) == b)
                        priority = -k;
            } else {
                const uint8_t *p = v->tokens.p;
                for (int k = 0; k < id; k++) p += 8 + v->lens[k];
                memcpy(&score, p, 4);
                priority = (double)score;
            }
            if (priority > best) best = priority, at = i, joined = id;
        }
        if (at < 0) break;
        list[at] = joined;
        memmove(list + at + 1, list + at + 2, (size_t)(len-- - at - 2) * sizeof *list);
    }
    for (int i = 0; i < len; i++) push(out, list[i]);
}

static bool in_vocabulary(const Vocabulary *v, const char *s, int n) {
    for (int i = 0; i < v->n; i++)
        if (v->lens[i] == n && !memcmp(v->texts[i], s, (size_t)n)) return true;
    return false;
}
// Adds random joinings of what is there.
static void random_merges(Vocabulary *v, const char *letters, int n) {
    int have[300], count = 0;
    for (int i = 0; i < v->n; i++)
        if (v->lens[i] == 1 && strchr(letters, v->texts[i][0]) && v->texts[i][0]) have[count++] = i;
    while (n) {
        int a = have[below(count)], b = have[below(count)], size = v->lens[a] + v->lens[b];
        char both[24];
        if (size > 12) continue;
        memcpy(both, v->texts[a], (size_t)v->lens[a]);
        memcpy(both + v->lens[a], v->texts[b], (size_t)v->lens[b]);
        if (in_vocabulary(v, both, size)) continue;
        have[count++] = token(v, both, (size_t)size, -(double)below(12), NORMAL);
        if (v->kind == BYTE_LEVEL) merge(v, a, b);
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
        wrong += !equal_ids(&got, expected.ids, expected.n);
        free(got.ids), free(expected.ids);
    }
    CHECK(!wrong,
          "%s joins the best neighbours first, then the leftmost: %d of 1500 texts are wrong",
          v->kind ? "SentencePiece BPE" : "byte-level BPE", wrong);
}

static void test_byte_level(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    all_bytes(v);
    random_merges(v, "abc \xc3\xa9", 80);
    Tokenizer t = open_tokenizer(v, "bytes.tok");
    test_naive(v, &t, "abc \xc3\xa9");
    free_tokenizer(&t);
    for (int rule = 0; rule < 4; rule++) {
        v->split = rule == 3 ? 1 : rule, v->isolate = rule == 3;
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
    free_vocabulary(v);

    v = new_vocabulary(BYTE_LEVEL);
    v->split = 1, v->flags = ADD_BOS;
    all_bytes(v);
    some_ranges(v);
    v->bos = token(v, "<s>", 3, 0, CONTROL);
    v->eos = token(v, "<|end|>", 7, 0, CONTROL);
    token(v, "<|end|>>", 8, 0, CONTROL), token(v, "\n\n", 2, 0, USER_DEFINED),
        token(v, "\n\n\n", 3, 0, USER_DEFINED);
    int previous = 'x';  // x, xx, xxxx, ...
    char xs[32];
    memset(xs, 'x', sizeof xs);
    for (size_t n = 2; n <= 32; n *= 2) {
        int id = token(v, xs, n, 0, NORMAL);
        merge(v, previous, previous);
        previous = id;
    }
    put32(&v->stops, 258), v->n_stops = 1;
    t = open_tokenizer(v, "special.tok");
    struct { const char *text, *typed, *ids, *says; bool bos; } cases[] = {
        {"a<|end|>b", NULL, "97 257 98", "special tokens are recognised in a text", false},
        {"<|end|>>", NULL, "258", "the longest special token wins", false},
        {"<|end|>", "\1\1\1\1\1\1\1", "60 124 101 110 100 124 62",
         "typed text does not form special tokens", false},
        {"<|end|>", "\0\0\0\0\1\1\1", "60 124 101 110 100 124 62", "nor does half of one", false},
        {"<|end|>>", "\0\0\0\0\0\0\0\1", "257 62", "a typed byte behind one does not count", false},
        {"\n\n\n\n\n", "\1\1\1\1\1", "260 259",
         "user-defined tokens are matched in any text, longest first", false},
        {"<|en", NULL, "60 124 101 110", "an unfinished special token is text", false},
        {"a", NULL, "256 97", "BOS comes first", true},
        {"<s>a", NULL, "256 97", "BOS is not doubled", true},
        {"a<s>", NULL, "256 97 256", "BOS elsewhere does not count as first", true},
        {"", NULL, "256", "an empty text is BOS", true},
        {"", NULL, "", "and nothing without it", false},
        {"xxxxx x", NULL, "262 120 32 120", "merges go from the best on", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *got = shown(&t, cases[i].text, cases[i].typed, cases[i].bos);
        CHECK(!strcmp(got, cases[i].ids), "%s: %s, not %s", cases[i].says, got, cases[i].ids);
    }
    CHECK(is_stop(&t, 258) && is_stop(&t, v->eos) && !is_stop(&t, 256) && !is_stop(&t, 5),
          "stops are EOS and the listed");
    CHECK(decode(&t, -1, 257).len == 0 && decode(&t, -1, -1).len == 0 &&
              decode(&t, -1, v->n).len == 0 && decode(&t, -1, 'x').len == 1,
          "special tokens and ids that are none have no text");
    size_t n = 1 << 20;
    char *many = get(n, 1);
    memset(many, 'x', n);
    double start = seconds();
    Ids ids = ids_of(&t, many, n, NULL, false);
    CHECK(ids.n == n / 32, "a word of a million equal bytes becomes %zu tokens, not %zu", n / 32,
          ids.n);
    printf("  a word of 1 MiB is encoded in %.2f s\n", seconds() - start);
    free(ids.ids);
    free(many);
    free_tokenizer(&t);
    free_vocabulary(v);
}

static void test_sentencepiece(void) {
    Vocabulary *v = new_vocabulary(SENTENCEPIECE);
    v->flags = ADD_BOS | ADD_SPACE_PREFIX;
    v->unk = token(v, "<unk>", 5, 0, CONTROL);
    v->bos = token(v, "<s>", 3, 0, CONTROL);
    v->eos = token(v, "</s>", 4, 0, CONTROL);
    all_bytes(v);  // 3 to 258
    // from 259 on
    const char *normal[] = {" ", "a", "b", "c", "ab", "bc", " a", "abc", "\xc3\xa9"};
    double scores[] = {-100, -100, -100, -100, -3, -3, -4, -9, -100};
    for (int i = 0; i < 9; i++) token(v, normal[i], strlen(normal[i]), scores[i], NORMAL);
    token(v, "aa", 2, 0, USER_DEFINED);  // 268
    token(v, "cb", 2, 0, UNUSED);
    Tokenizer t = open_tokenizer(v, "sentence.tok");
    struct { const char *text, *ids, *says; } cases[] = {
        {"bc", "1 259 264", "a space goes in front, BOS before it"},
        {"abc", "1 259 266",
         "ab joins before bc, of equal scores the leftmost, and before the space and a"},
        {"a", "1 265", "the space joins what follows"},
        {"", "1", "an empty text has no space"},
        {"\xc3\xa9", "1 259 267", "a character of two bytes is one symbol"},
        {"z\xe2\x82\xac", "1 259 125 229 133 175", "what the vocabulary lacks becomes bytes"},
        {"\xff", "1 259 258", "so does what is not UTF-8"},
        {"aaa", "1 268 265", "user-defined tokens are matched as a whole"},
        {"cb", "1 259 262 261", "unused tokens are not"},
        {"</s>b", "1 2 259 261", "special tokens are recognised"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *got = shown(&t, cases[i].text, NULL, true);
        CHECK(!strcmp(got, cases[i].ids), "%s: %s, not %s", cases[i].says, got, cases[i].ids);
    }
    CHECK(decode(&t, 1, 265).len == 1 && decode(&t, 5, 265).len == 2 && decode(&t, 1, 259).len == 0,
          "decoding drops the space behind BOS");
    CHECK(decode(&t, -1, 125).len == 1 && decode(&t, -1, 125).s[0] == 'z',
          "a byte token is its byte");
    free_tokenizer(&t);
    free_vocabulary(v);

    v = new_vocabulary(SENTENCEPIECE);
    for (int i = 0; i < 5; i++) token(v, &" abcd"[i], 1, -1000, NORMAL);
    random_merges(v, " abcd", 90);
    t = open_tokenizer(v, "random.tok");
    test_naive(v, &t, " abcd");
    free_tokenizer(&t);
    free_vocabulary(v);
}

// llama2.c's layout, of 3 special tokens, 256 bytes and `words`.
static Buffer llama2c_tokenizer(const char *const *words, int n) {
    Buffer b = {0};
    put32(&b, 20);
    for (int i = 0; i < 259 + n; i++) {
        char name[32] = "<unk>";
        if (i == 1 || i == 2) strcpy(name, i == 1 ? "\n<s>\n" : "\n</s>\n");
        if (i >= 3) snprintf(name, sizeof name, "<0x%02X>", i - 3);
        if (i >= 259) strcpy(name, words[i - 259]);
        put(&b, &(float){i < 259 ? 0 : (float)-i}, 4);
        put32(&b, (int)strlen(name));
        put(&b, name, strlen(name));
    }
    return b;
}
static const char *const story_words[] = {" ", "a", "b", "c", " a", "ab", "abc"};  // 259 to 265

static void test_llama2c_tokenizer(void) {
    Buffer b = llama2c_tokenizer(story_words, 7);
    Tokenizer t;
    Model m = {.c = {.vocab_size = 266}};
    const char *path = save("llama2c.tok", b.p, b.n), *wrong = load_tokenizer(&t, path, &m);
    if (!CHECK(!wrong, "llama2.c's layout opens: it %s", wrong)) return;
    const char *got = shown(&t, "abc a\n", NULL, true);
    CHECK(!strcmp(got, "1 263 261 262 263 13"), "llama2.c's layout encodes: %s", got);
    CHECK(is_stop(&t, 1) && !is_stop(&t, 2), "only BOS ends one of llama2.c's stories");
    CHECK(decode(&t, -1, 13).s[0] == '\n' && decode(&t, 1, 263).len == 1, "and decodes");
    free_tokenizer(&t);
    struct { int vocab; size_t cut; uint64_t hash; } bad[] = {
        {265, 0, 0}, {267, 0, 0}, {266, 1, 0}, {266, 100, 0}, {266, b.n - 3, 0}, {266, b.n - 8, 0},
        {266, 0, 5}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        m = (Model){.c = {.vocab_size = bad[i].vocab, .tokenizer_hash = bad[i].hash}};
        path = save("llama2c.tok", b.p, b.n - bad[i].cut);
        wrong = load_tokenizer(&t, path, &m);
        CHECK(wrong, "a tokenizer of 266 tokens less %zu bytes is refused for a model of %d",
              bad[i].cut, bad[i].vocab);
        free_tokenizer(&t);
    }
    free(b.p);

    static const char *const pieces[] = {"<unk>",  "<s>",    "</s>",  "<0x-1>",
                                         "<0x+1>", "<0xag>", "<0x41>"};
    Buffer odd = {0};
    uint32_t longest = 6;
    put(&odd, &longest, 4);
    for (int i = 0; i < 7; i++) {
        float score = 0;
        uint32_t length = (uint32_t)strlen(pieces[i]);
        put(&odd, &score, 4), put(&odd, &length, 4), put(&odd, pieces[i], length);
    }
    m = (Model){.c = {.vocab_size = 7}};
    wrong = load_tokenizer(&t, save("odd.tok", odd.p, odd.n), &m);
    if (!CHECK(!wrong, "pieces that look like bytes are no errors: it %s", wrong)) return;
    for (int i = 3; i < 6; i++)
        CHECK(t.tokens[i].type == NORMAL, "%s is not a byte", pieces[i]);
    CHECK(t.tokens[6].type == BYTE && t.tokens[6].text.s[0] == 'A', "<0x41> is the byte A");
    free_tokenizer(&t);
    m.c.vocab_size = 1;
    wrong = load_tokenizer(&t, save("odd.tok", odd.p, 4 + 8 + 5), &m);
    CHECK(wrong, "a llama2.c tokenizer without BOS and EOS is refused");
    free_tokenizer(&t);
    free(odd.p);
}

static void test_real_tokenizer(void) {
    static const struct { const char *text; size_t n; int ids[32]; } cases[] = {
        {"Once upon a time",
         4, {6403, 1980, 253, 655}},
        {"Hello, world! It's 2026; we've 1234567 things.",
         24, {19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 38, 43, 392, 3543, 216, 33,
         34, 35, 36, 37, 38, 39, 1495, 30}},
        {"  leading and   multiple   spaces \n\n\ttabs",
         11, {216, 2899, 284, 256, 2701, 256, 5600, 38028, 197, 100, 7366}},
        {"na\xc3\xafve caf\xc3\xa9 \xe2\x80\x94 \xe2\x80\x9cquotes\xe2\x80\x9d \xe2\x80\xa6 \xc2"
         "\xbd \xc2\xb2 \xe2\x85\xa7",
         17, {3546, 46494, 37366, 1841, 619, 385, 2346, 573, 5548, 216, 16738, 216, 19133,
         216, 173, 223, 117}},
        {"\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e\xe3\x81\xae\xe3\x83\x86\xe3\x82\xad\xe3\x82\xb9\xe3"
         "\x83\x88\xe3\x81\xa8\xe4\xb8\xad\xe6\x96\x87\xe6\xb7\xb7\xe5\x90\x88\xef\xbc\x8c\xe6\xa0"
         "\x87\xe7\x82\xb9\xe3\x80\x82",
         28, {23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134,
         11100, 226, 7365, 118, 28589, 29184, 177, 132, 132, 16357, 226, 12831, 46781,
         44083, 19076}},
        {"\xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82, \xd0\xbc\xd0\xb8\xd1\x80! \xd0\x81\xd0"
         "\xb6. \xce\x91\xce\x92\xce\x93 \xce\xb4\xce\xad\xce\xbb\xcf\x84\xce\xb1",
         25, {155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175, 17, 5470, 219, 40186,
         30, 5664, 235, 153, 236, 153, 237, 31035, 34075, 17162, 14514, 8998}},
        {"emoji: \xf0\x9f\x98\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f"
         "\x91\xa7\xe2\x80\x8d\xf0\x9f\x91\xa6\xf0\x9f\x87\xab\xf0\x9f\x87\xb7 end",
         30, {391, 33777, 42, 40303, 218, 10813, 235, 119, 321, 231, 10813, 235, 119, 321,
         231, 10813, 235, 117, 321, 231, 10813, 235, 116, 10813, 225, 121, 10813, 225,
         132, 1112}},
        {"def f(x):\n    return x**2  # comment\n",
         14, {1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5189, 198}},
        {"\r\nwindows\r\nlines\r\n",
         7, {201, 198, 37066, 201, 198, 5110, 2738}},
        {"<|im_start|>user\nhi<|im_end|>\n",
         6, {1, 4093, 198, 6004, 2, 198}},
        {"a\xcc\x81 combining, \xc2\xa0nbsp, \xe2\x80\x8bzwsp, \xe3\x80\x80ideographic",
         21, {81, 151, 219, 9301, 28, 216, 15442, 94, 32093, 28, 459, 229, 106, 103, 2401,
         28, 216, 12109, 218, 489, 4551}},
        {"\xd9\xa1\xd9\xa2\xd9\xa3 \xdb\xb4\xdb\xb5\xdb\xb6 \xe0\xa5\xa7\xe0\xa5\xa8\xe0\xa5\xa9",
         20, {164, 111, 164, 112, 164, 113, 216, 166, 129, 166, 130, 166, 131, 216, 9310,
         117, 9310, 118, 9310, 119}},
        {"I'LL can't WON'T they're",
         11, {57, 23, 16421, 416, 982, 408, 2154, 23, 68, 502, 2316}},
        {"....!!!?""?""?---",
         5, {5592, 29646, 16693, 47, 5583}},
        {"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
         18, {31069, 31069, 31069, 31069, 31069, 31069, 31069, 31069, 31069, 31069, 31069,
         31069, 31069, 31069, 31069, 31069, 31069, 10969}},
        {" ",
         1, {216}},
        {"\n",
         1, {198}},
        {"1234*4321=5332114",
         17, {33, 34, 35, 36, 26, 36, 35, 34, 33, 45, 37, 35, 35, 34, 33, 33, 36}},
    };
    static const int chat1[] = {
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
        407, 19712, 8182, 2, 198, 1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198};
    static const int chat2[] = {
        1, 9690, 198, 2683, 359, 253, 30820, 30, 2, 198, 1, 4093, 198, 19556, 2, 198, 1, 520, 9531,
        198, 40909, 17, 2, 198, 1, 4093, 198, 3087, 85, 2, 198, 1, 520, 9531, 198};
    static const char rendered1[] =
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n";
    static const char rendered2[] =
        "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nArr!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n";
    Tokenizer t;
    Model m = {.c = {.vocab_size = 49152}};
    int n = (int)(sizeof cases / sizeof *cases);
    if (access("tokenizer.bin", R_OK)) {
        skip(n + 6, "SmolLM2's tokenizer: there is no tokenizer.bin here");
        return;
    }
    const char *wrong = load_tokenizer(&t, "tokenizer.bin", &m);
    if (!CHECK(!wrong, "tokenizer.bin opens: it %s", wrong)) return;
    for (int i = 0; i < n; i++)  {
        Ids ids = ids_of(&t, cases[i].text, strlen(cases[i].text), NULL, true);
        CHECK(equal_ids(&ids, cases[i].ids, cases[i].n), "SmolLM2's tokens of \"%s\"",
              cases[i].text);
        free(ids.ids);
    }
    Ids ids = ids_of(&t, rendered1, strlen(rendered1), NULL, true);
    CHECK(equal_ids(&ids, chat1, 32), "SmolLM2's tokens of a rendered chat");
    free(ids.ids), ids = ids_of(&t, rendered2, strlen(rendered2), NULL, true);
    CHECK(equal_ids(&ids, chat2, 35), "SmolLM2's tokens of a rendered chat with a system turn");
    free(ids.ids);
    Prompt p = {0}, q = {0};
    append_turn(&p, &t, true, (Text){NULL, 0}, (Text){"Hi there", 8});
    ids = ids_of(&t, p.s, p.n, p.typed, true);
    CHECK(equal_ids(&ids, chat1, 32), "a first turn is written as the chat template writes it: %s",
          p.s);
    free(ids.ids);
    append_turn(&q, &t, true, (Text){"You are a pirate.", 17}, (Text){"Hello", 5});
    append(&q, (Text){"Arr!", 4}, true);
    append(&q, t.chat[ASSISTANT_AFTER], false);
    append_turn(&q, &t, false, (Text){NULL, 0}, (Text){"Bye", 3});
    ids = ids_of(&t, q.s, q.n, q.typed, true);
    CHECK(equal_ids(&ids, chat2, 35), "so are two turns with a system turn: %s", q.s);
    free(ids.ids), free(p.s), free(p.typed), free(q.s), free(q.typed);
    p = (Prompt){0};
    append_turn(&p, &t, true, (Text){NULL, 0}, (Text){"<|im_end|>", 10});
    ids = ids_of(&t, p.s, p.n, p.typed, true);
    int ends = 0;
    for (size_t i = 0; i < ids.n; i++) ends += ids.ids[i] == 2;
    CHECK(ends == 2, "a user who types <|im_end|> does not end the turn");
    free(ids.ids), free(p.s), free(p.typed);
    free_tokenizer(&t);
}

static void test_tokenizer(void) {
    test_words();
    test_byte_level();
    test_sentencepiece();
    test_llama2c_tokenizer();
    test_real_tokenizer();
}

// =================================================================================================
// Running ./run
// =================================================================================================

typedef struct {
    const char *input;    // what stdin holds; NULL: nothing
    bool closed_pipe;     // stdout is a pipe that nobody reads
    bool no_output;       // stdout is closed
    size_t memory;        // limit of its address space; 0: none
    size_t file_size;     // limit of a file's size; 0: none
    size_t interrupt_at;  // SIGINT when stdout has this many bytes; 0: never
} How;
typedef struct { int status, signal; Buffer out, err; char command[400]; } Ran;

static const char *program(void) {
    const char *path = getenv("RUN");
    return path ? path : "./run";
}

static Ran run_program(How how, const char *const *arguments) {
    const char *argv[40] = {program()};
    Ran ran = {.status = -1};
    int used = 0, n = 1, pipe_ends[2] = {-1, -1};
    for (; arguments[n - 1]; n++) {
        argv[n] = arguments[n - 1];
        if (used < 250) used += snprintf(ran.command + used, 40, " %.38s", argv[n]);
    }
    const char *in = how.input ? save("stdin", how.input, strlen(how.input)) : "/dev/null";
    const char *out = in_folder("stdout"), *err = in_folder("stderr");
    unlink(out);
    if (how.closed_pipe && pipe(pipe_ends)) abort();
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) abort();
    if (pid == 0) {
        int fds[] = {open(in, O_RDONLY), pipe_ends[1], -1}, fresh = O_WRONLY | O_CREAT | O_TRUNC;
        if (!how.closed_pipe) fds[1] = open(out, fresh, 0600);
        fds[2] = open(err, fresh, 0600);
        for (int i = 0; i < 3; i++) if (fds[i] < 0 || dup2(fds[i], i) < 0) _exit(99);
        for (int i = 3; i < 16; i++) close(i);
        if (how.no_output) close(1);
        struct rlimit limit = {how.memory, how.memory}, core = {0, 0};
        setrlimit(RLIMIT_CORE, &core);
        if (how.memory) setrlimit(RLIMIT_AS, &limit);
        limit = (struct rlimit){how.file_size, how.file_size};
        if (how.file_size) setrlimit(RLIMIT_FSIZE, &limit);
        signal(SIGPIPE, SIG_DFL);
        alarm(patience(10));
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(98);
    }
    if (how.closed_pipe) close(pipe_ends[0]), close(pipe_ends[1]);
    struct stat st;
    for (int i = 0; how.interrupt_at && i < 5000; i++, usleep(1000))
        if (!stat(out, &st) && (size_t)st.st_size >= how.interrupt_at) {
            kill(pid, SIGINT);
            break;
        }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    ran.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    ran.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    ran.out = slurp(out);
    ran.err = slurp(err);
    return ran;
}
#define RUN_AS(how, ...) run_program(how, (const char *[]){__VA_ARGS__, NULL})
#define RUN(...) RUN_AS(((How){0}), __VA_ARGS__)
static void free_ran(Ran *r) { free(r->out.p), free(r->err.p); }

static int lines(const Buffer *b) {
    int n = 0;
    for (size_t i = 0; i < b->n; i++) n += b->p[i] == '\n';
    return n;
}
static bool one_line(const Ran *r) {
    return !strncmp((char *)r->err.p, "run: ", 5) && lines(&r->err) == 1 &&
           r->err.p[r->err.n - 1] == '\n' && r->err.n > 12;
}
// Ended with this status, said why in one line, and wrote nothing to stdout. Frees r.
#define refused(...) refused_(__LINE__, __VA_ARGS__)
static void refused_(int line, Ran r, int status, const char *what) {
    bool good = r.signal == 0 && r.status == status && r.out.n == 0 && one_line(&r);
    check_(good, line,
           "%s is refused with %d and one line:%s gives %d, signal %d, %zu bytes, \"%.300s\"",
           what, status, r.command, r.status, r.signal, r.out.n, r.err.p);
    free_ran(&r);
}
// Did what it was asked to, or said in one line why not; never a crash. Frees r.
#define survived(...) survived_(__LINE__, __VA_ARGS__)
static void survived_(int line, Ran r, const char *what) {
    check_(r.signal == 0 && (r.status == 0 || (r.status == 1 && one_line(&r))), line,
           "%s never ends in a crash:%s gives status %d, signal %d, \"%.300s\"", what, r.command,
           r.status, r.signal, r.err.p);
    free_ran(&r);
}
#define prints(...) prints_(__LINE__, __VA_ARGS__)
static void prints_(int line, Ran r, const char *expected, const char *what) {
    bool good = r.signal == 0 && r.status == 0 && !strcmp((char *)r.out.p, expected);
    check_(good, line, "%s:%s gives status %d, signal %d, \"%.200s\", not \"%.200s\", \"%.300s\"",
           what, r.command, r.status, r.signal, r.out.p, expected, r.err.p);
    free_ran(&r);
}

// ---- A model with its tokenizer: tiny.bin and tiny.tok, which most tests below use

static Vocabulary *tiny_vocabulary(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    v->split = 2, v->digits = 1;
    all_bytes(v);
    some_ranges(v);
    random_merges(v, "abc d", 20);
    v->bos = token(v, "<s>", 3, 0, CONTROL);
    token(v, "<|end|>", 7, 0, CONTROL);
    put32(&v->stops, 277), v->n_stops = 1;
    const char *const chat[] = {"", "<s>system ", "<|end|>", "<s>", "<|end|>", "<s>", "<|end|>",
                                "<s>", "<|end|>", "\n"};
    for (int i = 0; i < 10; i++) chat_piece(v, chat[i]);
    return v;
}

// Adds a text and a chat with their tokens to what -m check recomputes.
static void certify_tokenizer(Made *m, const Vocabulary *v) {
    Tokenizer t = open_tokenizer(v, "certify.tok");
    const char *text = "a bad cab: 12 <s>caf\xc3\xa9!", *user = "abc<s>";
    Ids ids[2] = {ids_of(&t, text, strlen(text), NULL, true), {0}};
    push(&ids[1], v->bos);  // the chat's pieces around the typed text
    Ids typed = ids_of(&t, user, 6, "\1\1\1\1\1\1", false);
    for (size_t i = 0; i < typed.n; i++) push(&ids[1], typed.ids[i]);
    push(&ids[1], 277);
    Buffer b = {0};
    put32(&b, 2);
    for (int i = 0; i < 2; i++) {
        const char *s = i ? user : text;
        put32(&b, i), put32(&b, (int)strlen(s)), put32(&b, (int)ids[i].n);
        put(&b, s, strlen(s));
        align(&b, 4);
        put(&b, ids[i].ids, ids[i].n * 4);
        free(ids[i].ids);
    }
    free_tensor(&m->check_cases);
    m->check_cases = bytes_tensor(&b);
    Buffer file = tokenizer_file(v);
    m->tokenizer_hash = hash_of(file.p + 16, file.n - 16);
    free(file.p), free(b.p), free(typed.ids);
    free_tokenizer(&t);
}

static Made tiny_model(int which, int dtype) {
    Shape s = family(which, dtype);
    s.vocab = 278, s.layers = 1 + (which == GEMMA);
    return make_weights(&s);
}
static Buffer save_tiny(void) {  // returns the model's bytes
    uint64_t keep = random_state;
    random_state = 99;
    Vocabulary *v = tiny_vocabulary();
    Buffer t = tokenizer_file(v);
    save("tiny.tok", t.p, t.n);
    Made m = tiny_model(LLAMA, Q8);
    certify(&m);
    certify_tokenizer(&m, v);
    Buffer b = version_3(&m);
    save("tiny.bin", b.p, b.n);
    free_made(&m), free_vocabulary(v), free(t.p);
    random_state = keep;
    return b;
}

static bool no_program(void) {
    if (!access(program(), X_OK)) return false;
    CHECK(false, "there is %s to test", program());
    return true;
}

// =================================================================================================
// 7. Files, whole and damaged
// =================================================================================================

static const char *saved(const char *name, const Buffer *b, size_t n) {
    return save(name, b->p, n);
}
static Ran run_logits(const char *model) {
    return RUN(model, "-m", "logits", "-i", "1 2 3", "-j", "1");
}

static void test_whole_files(void) {
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            Vocabulary *v = tiny_vocabulary();
            Made m = tiny_model(which, dtype);
            certify(&m);
            certify_tokenizer(&m, v);
            Buffer t = tokenizer_file(v), b = version_3(&m);
            saved("whole.tok", &t, t.n);
            const char *path = saved("whole.bin", &b, b.n);
            char what[100];
            snprintf(what, sizeof what, "%s %s passes its check", m.s.name, formats[dtype]);
            prints(RUN(path, "-m", "check", "-j", "2"), "ok\n", what);
            if (dtype == F32) {  // the last four tensors of the directory are left out
                set32(b.p + 124, (int)read_u32(b.p + 124) - 4);
                seal(&b);
                path = saved("whole.bin", &b, b.n);
                prints(RUN(path, "-m", "check"), "ok\n", "a model without reference values");
            }
            free(t.p), free(b.p);
            free_made(&m), free_vocabulary(v);
        }
}

// One byte after another changed: refused in the header and directory, found by -m check elsewhere.
static void test_flips(const Buffer *whole) {
    Buffer b = {0};
    put(&b, whole->p, whole->n);
    size_t directory = 256 + 32 * (size_t)read_u32(b.p + 124);
    for (size_t i = 0; i < directory; i++) {
        if (i >= 104 && i < 112) continue;  // the content's hash is the business of -m check
        b.p[i] ^= (uint8_t)(1 << (i * 5 + i / 8) % 8);
        char what[60];
        snprintf(what, sizeof what, "a model with byte %zu changed", i);
        refused(run_logits(saved("flipped.bin", &b, b.n)), 1, what);
        b.p[i] = whole->p[i];
    }
    const char *tok = in_folder("tiny.tok");
    for (int i = 0; i < 60; i++) {
        size_t at = i < 8 ? 104 + (size_t)i : directory + (size_t)(rnd() % (b.n - directory));
        uint8_t mask = (uint8_t)(1 << below(8));
        b.p[at] ^= mask;
        const char *path = saved("flipped.bin", &b, b.n);
        char what[60];
        snprintf(what, sizeof what, "a model with byte %zu changed", at);
        if (i >= 8) survived(run_logits(path), what);
        refused(RUN(path, "-m", "check", "-q", "-z", tok, "-j", "1"), 1, what);
        b.p[at] ^= mask;
    }
    free(b.p);
}

static void test_cuts(const Buffer *whole, int version) {
    size_t cuts[400], n = 0, directory = 0;
    if (version == 3) directory = 256 + 32 * (size_t)read_u32(whole->p + 124);
    for (size_t i = 1; i < 300; i += i < 64 ? 3 : 27) cuts[n++] = i;
    for (size_t i = 256; i < directory; i += 32) {
        uint64_t offset, bytes;
        memcpy(&offset, whole->p + i + 16, 8), memcpy(&bytes, whole->p + i + 24, 8);
        for (size_t d = 0; d < 3; d++)
            cuts[n++] = offset + d - 1, cuts[n++] = offset + bytes + d - 1;
    }
    for (size_t i = 1; i < 8; i++) cuts[n++] = whole->n / 8 * i + i;
    cuts[n++] = 7, cuts[n++] = 27, cuts[n++] = 28, cuts[n++] = 255, cuts[n++] = 256,
    cuts[n++] = 257;
    cuts[n++] = whole->n - 1, cuts[n++] = whole->n - 4, cuts[n++] = whole->n - 64;
    char what[60];
    for (size_t i = 0; i < n; i++) {
        if (cuts[i] >= whole->n) continue;
        snprintf(what, sizeof what, "a version %d model cut to %zu bytes", version, cuts[i]);
        refused(run_logits(saved("cut.bin", whole, cuts[i])), 1, what);
    }
    for (size_t pad = 1; pad <= 64; pad *= 4) {
        Buffer b = {0};
        put(&b, whole->p, whole->n), put(&b, NULL, pad);
        snprintf(what, sizeof what, "a version %d model with %zu bytes too many", version, pad);
        refused(run_logits(saved("padded.bin", &b, b.n)), 1, what);
        free(b.p);
    }
}

// Fields of the header and the directory with senseless values, under a hash that is right.
static void test_fields(const Buffer *whole) {
    static const int64_t values[] = {0, -1, INT_MAX, INT_MIN, 65536, 1 << 20, 1 << 24, 3};
    static const struct { int offset, any; const char *name; } fields[] = {
        {8, 0, "dim"}, {12, 0, "hidden_dim"}, {16, 0, "n_layers"}, {20, 0, "n_heads"},
        {24, 0, "n_kv_heads"}, {28, 0, "vocab_size"}, {32, 1, "seq_len"}, {36, 0, "head_dim"},
        {48, 2, "activation"}, {60, 3, "sliding_window"}, {124, 0, "n_tensors"},
        {112, 0, "file_size"}, {44, 4, "flags"}, {40, 4, "norm_eps"}, {52, 4, "embed_scale"},
        {56, 4, "attn_scale"}};
    Buffer b = {0};
    char what[90];
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
        for (int i = 0; i < 8; i++) {
            b.n = 0;
            put(&b, whole->p, whole->n);
            set32(b.p + fields[f].offset, values[i]);
            seal(&b);
            snprintf(what, sizeof what, "a header with %s = %lld", fields[f].name,
                     (long long)values[i]);
            bool may = (fields[f].any == 1 && values[i] > 0 && values[i] <= 1 << 24) ||
                       fields[f].any == 4 || (fields[f].any == 2 && values[i] == 0) ||
                       (fields[f].any == 3 && values[i] >= 0);
            Ran r = run_logits(saved("field.bin", &b, b.n));
            if (may) survived(r, what);
            else refused(r, 1, what);
        }
    static const int64_t products[][6] = {  // dim, hidden, heads, kv heads, vocab, head_dim
        {1 << 20, 1 << 20, 1 << 14, 1 << 14, 1 << 24, 1 << 14},
        {1 << 20, 1 << 20, 1, 1, 1 << 24, 2}, {1 << 16, 1 << 16, 1 << 14, 1, 1 << 16, 64},
        {1 << 20, 1, 1 << 14, 1 << 14, 1, 64}, {64, 96, 4, 3, 278, 16}, {64, 96, 4, 2, 278, 15}};
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        b.n = 0;
        put(&b, whole->p, whole->n);
        static const int offsets[] = {8, 12, 20, 24, 28, 36};
        for (int j = 0; j < 6; j++) set32(b.p + offsets[j], products[i][j]);
        seal(&b);
        snprintf(what, sizeof what, "a header with huge products (%zu)", i);
        refused(run_logits(saved("field.bin", &b, b.n)), 1, what);
    }
    static const struct { int offset, size; uint64_t value; const char *name; } entries[] = {
        {0, 4, 6, "dtype"}, {0, 4, 7, "dtype"}, {0, 4, 0xffffffff, "dtype"}, {4, 4, 0, "rows"},
        {4, 4, 0x80000000, "rows"}, {8, 4, 0, "cols"}, {8, 4, 0xffffffff, "cols"},
        {8, 4, 0x10000, "cols"}, {16, 8, 1, "offset"}, {16, 8, (uint64_t)1 << 40, "offset"},
        {16, 8, UINT64_MAX - 63, "offset"}, {16, 8, (uint64_t)1 << 63, "offset"},
        {24, 8, 0, "bytes"}, {24, 8, UINT64_MAX, "bytes"}, {24, 8, (uint64_t)1 << 40, "bytes"}};
    uint32_t n = read_u32(whole->p + 124);
    for (uint32_t t = 0; t < n; t += t < 3 || t + 6 > n ? 1 : 3)
        for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
            b.n = 0;
            put(&b, whole->p, whole->n);
            memcpy(b.p + 256 + 32 * t + entries[i].offset, &entries[i].value,
                   (size_t)entries[i].size);
            seal(&b);
            bool bytes = read_u32(whole->p + 256 + 32 * t) == BYTES;
            if (bytes && entries[i].offset == 0 && entries[i].value == BYTES) continue;
            snprintf(what, sizeof what, "tensor %u with %s = %llu", t, entries[i].name,
                     (unsigned long long)entries[i].value);
            refused(run_logits(saved("field.bin", &b, b.n)), 1, what);
        }
    // The last tensor of the file reaches one block beyond its end.
    b.n = 0;
    put(&b, whole->p, whole->n);
    set64(b.p + 256 + 16, b.n), seal(&b);
    refused(run_logits(saved("field.bin", &b, b.n)), 1, "a tensor that starts at the end");
    b.n = 0;
    put(&b, whole->p, whole->n);
    set32(b.p + 124, (int)n + 1);
    seal(&b);
    refused(run_logits(saved("field.bin", &b, b.n)), 1, "a directory with one tensor more");
    free(b.p);
}

static void test_tokenizer_files(void) {
    Buffer whole = slurp(in_folder("tiny.tok")), b = {0};
    Made made = tiny_model(LLAMA, Q8);  // without a fingerprint: any tokenizer of its size will do
    Buffer model = version_3(&made);
    const char *model_path = in_folder("any.bin"), *tok_path = in_folder("damaged.tok");
    char what[100];
    saved("any.bin", &model, model.n);
#define TOKENIZE RUN(model_path, "-z", tok_path, "-m", "tokenize", "-i", "abc <s> 12 d")
    saved("damaged.tok", &whole, whole.n);
    Ran r = TOKENIZE;
    CHECK(r.status == 0 && r.out.n > 4 && lines(&r.out) == 1,
          "tokenize prints ids on one line: \"%s\" \"%s\"", r.out.p, r.err.p);
    free_ran(&r);
    for (size_t i = 0; i < whole.n; i += i < 100 ? 1 + i % 3 : 61) {
        put(&b, whole.p, whole.n);
        b.p[i] ^= (uint8_t)(1 << i % 8);
        saved("damaged.tok", &b, b.n);
        snprintf(what, sizeof what, "a tokenizer with byte %zu changed", i);
        refused(TOKENIZE, 1, what);
        if (i < 16) { b.n = 0; continue; }
        set64(b.p + 8, hash_of(b.p + 16, b.n - 16));
        saved("damaged.tok", &b, b.n);
        snprintf(what, sizeof what, "a tokenizer with byte %zu changed under a right hash", i);
        survived(TOKENIZE, what);
        saved("damaged.tok", &whole, i);
        snprintf(what, sizeof what, "a tokenizer cut to %zu bytes", i);
        refused(TOKENIZE, 1, what);
        b.n = 0;
        put(&b, whole.p, i);
        if (i >= 80) set64(b.p + 8, hash_of(b.p + 16, b.n - 16));
        saved("damaged.tok", &b, b.n);
        refused(TOKENIZE, 1, "one under a right hash");
        b.n = 0;
    }
    static const int64_t values[] = {-1, 0, INT_MAX, INT_MIN, 1 << 20, 1 << 28, 0x1fffffff};
    for (int offset = 16; offset < 60; offset += 4)
        for (int i = 0; i < 7; i++) {
            b.n = 0;
            put(&b, whole.p, whole.n);
            set32(b.p + offset, values[i]);
            set64(b.p + 8, hash_of(b.p + 16, b.n - 16));
            saved("damaged.tok", &b, b.n);
            snprintf(what, sizeof what, "a tokenizer with %lld at %d", (long long)values[i],
                     offset);
            r = TOKENIZE;
            bool count = offset == 20 || offset >= 44;
            if (count && !(values[i] == 0 && offset != 20)) refused(r, 1, what);
            else survived(r, what);
        }
    for (size_t pad = 1; pad <= 64; pad *= 8) {
        b.n = 0;
        put(&b, whole.p, whole.n), put(&b, NULL, pad);
        saved("damaged.tok", &b, b.n);
        refused(TOKENIZE, 1, "a padded tokenizer");
        set64(b.p + 8, hash_of(b.p + 16, b.n - 16));
        saved("damaged.tok", &b, b.n);
        refused(TOKENIZE, 1, "a padded tokenizer under a right hash");
    }
    b.n = 0;  // a tokenizer that knows no spaces must not run off the text
    Vocabulary *v = tiny_vocabulary();
    v->ranges.n = 0, v->n_ranges = 0;
    for (v->split = 1; v->split <= 2; v->split++) {
        Buffer file = tokenizer_file(v);
        saved("damaged.tok", &file, file.n);
        prints(RUN(model_path, "-z", tok_path, "-m", "tokenize", "-i", " "), "32\n",
               "a tokenizer without character classes works");
        free(file.p);
    }
    free_vocabulary(v);
    v = tiny_vocabulary();
    merge(v, 97, 278);
    Buffer strange = tokenizer_file(v);
    saved("damaged.tok", &strange, strange.n);
    refused(TOKENIZE, 1, "a merge of a token that does not exist");
    free(strange.p);
    free_vocabulary(v);
    v = new_vocabulary(SENTENCEPIECE);
    all_bytes(v);
    for (int i = 256; i < 278; i++) token(v, "ab", 2, 0, NORMAL);
    Buffer other = tokenizer_file(v);
    saved("damaged.tok", &other, other.n);
    survived(TOKENIZE, "an unusual tokenizer");
    refused(RUN(in_folder("tiny.bin"), "-z", tok_path, "-i", "a"), 1,
            "the tokenizer of another model");
    saved("damaged.tok", &whole, 0);
    refused(TOKENIZE, 1, "an empty tokenizer");
    refused(RUN(model_path, "-z", folder, "-i", "a"), 1, "a directory as tokenizer");
    refused(RUN(model_path, "-z", in_folder("nothing"), "-i", "a"), 1, "a missing tokenizer");
    unlink(in_folder("any.tok"));
    refused(RUN(model_path, "-i", "a"), 1, "a model without a tokenizer beside it");
    saved("any.tok", &whole, 100);
    refused(RUN(model_path, "-i", "a"), 1, "a model with a damaged tokenizer beside it");
    saved("tokenizer.bin", &whole, whole.n);
    r = RUN(model_path, "-i", "a", "-m", "tokenize");
    CHECK(r.status == 0 && !strcmp((char *)r.out.p, "97\n"),
          "the first tokenizer that fits is taken: %s", r.err.p);
    free_ran(&r);
    unlink(in_folder("tokenizer.bin"));
    free_vocabulary(v), free_made(&made);
    free(whole.p), free(b.p), free(model.p), free(other.p);
}

static void test_llama2c_files(void) {
    Shape s = family(LLAMA, ROWS);
    s.vocab = 266, s.layers = 1, s.seq_len = 64;
    for (int version = 0; version < 2; version++) {
        s.flags = version ? TIED_EMBEDDING : 0;
        Made m = make_weights(&s);
        Buffer whole = llama2c_file(&m, version), b = {0};
        Ran r = run_logits(saved("v.bin", &whole, whole.n));
        CHECK(r.status == 0 && r.out.n == 3 * 266 * 4, "a version %d model gives logits: %s",
              version, r.err.p);
        free_ran(&r);
        test_cuts(&whole, version);
        static const int64_t values[] = {0, -1, INT_MAX, INT_MIN, 1 << 20, 65535};
        for (int field = 0; field < 7; field++)
            for (int i = 0; i < 6; i++) {
                b.n = 0;
                put(&b, whole.p, whole.n);
                set32(b.p + 8 * version + 4 * field, values[i]);
                char what[80];
                snprintf(what, sizeof what, "a version %d header with %lld in field %d", version,
                         (long long)values[i], field);
                Ran ran = run_logits(saved("v.bin", &b, b.n));
                if (version == 1 && field == 6 && values[i] > 0 && values[i] <= 1 << 24)
                    survived(ran, what);
                else refused(ran, 1, what);  // version 0 holds tables as long as its context
            }
        refused(RUN(saved("v.bin", &whole, whole.n), "-m", "check"), 1,
                "a check of llama2.c's files");
        free(whole.p), free(b.p);
        free_made(&m);
    }
}

static void test_files(void) {
    if (no_program()) return;
    Buffer tiny = save_tiny();
    test_whole_files();
    refused(run_logits(in_folder("missing.bin")), 1, "a missing model");
    refused(run_logits(folder), 1, "a directory");
    refused(run_logits(saved("empty.bin", &tiny, 0)), 1, "an empty model");
    refused(run_logits(save("text.bin", "Once upon a time, there was a text, not a model.", 48)), 1,
            "a text");
    Ran gguf = run_logits(save("a.gguf", "GGUF: what others publish; export.py reads these", 48));
    CHECK(strstr((char *)gguf.err.p, "export.py"), "a GGUF file is pointed to export.py");
    refused(gguf, 1, "a GGUF file");
    const char *locked = saved("locked.bin", &tiny, tiny.n);
    chmod(locked, 0);
    if (!access(locked, R_OK)) skip(1, "an unreadable model: this user may read everything");
    else refused(run_logits(locked), 1, "an unreadable model");
    for (int version = 2; version < 5; version += 2) {
        Buffer b = {0};
        put(&b, tiny.p, tiny.n);
        set32(b.p + 4, version);
        Ran r = run_logits(saved("version.bin", &b, b.n));
        CHECK(version != 2 || strstr((char *)r.err.p, "export.py"),
              "version 2 is pointed to export.py: %s", r.err.p);
        refused(r, 1, "an unknown version");
        free(b.p);
    }
    test_cuts(&tiny, 3);
    test_flips(&tiny);
    test_fields(&tiny);
    test_tokenizer_files();
    test_llama2c_files();
    for (int odd = 0; odd < 2; odd++) {  // files that agree with themselves, but not with the rules
        Shape s = family(LLAMA, Q8);
        if (odd) s.head_dim = 15;
        else s.kv_heads = 3;
        Made strange = make_weights(&s);
        Buffer b = version_3(&strange);
        const char *path = saved("strange.bin", &b, b.n);
        refused(run_logits(path), 1, odd ? "an odd head size" : "4 query heads for 3 key heads");
        free(b.p), free_made(&strange);
    }
    free(tiny.p);
    Made m = tiny_model(LLAMA, F32);
    for (int i = 0; i < 3; i++) {
        const float large[] = {INFINITY, NAN, -1e22f};
        ((float *)(void *)m.final_norm.bytes)[3] = large[i];
        Buffer b = version_3(&m);
        refused(run_logits(saved("infinite.bin", &b, b.n)), 1, "a model with too large logits");
        free(b.p);
    }
    free_made(&m);
}

// =================================================================================================
// 8. The command line
// =================================================================================================

// A model with room for long texts that never end: its tokenizer has no EOS and no stops.
static void save_endless(void) {
    Vocabulary *v = tiny_vocabulary();
    v->n_stops = 0, v->stops.n = 0;
    Shape s = family(LLAMA, Q8);
    s.vocab = 278, s.layers = 1, s.seq_len = 1 << 20;
    Made m = make_weights(&s);
    Buffer b = version_3(&m), t = tokenizer_file(v);
    save("endless.bin", b.p, b.n), save("endless.tok", t.p, t.n);
    free(b.p), free(t.p), free_made(&m), free_vocabulary(v);
}

static void test_refused_options(const char *model) {
    static const char *const wrong[][4] = {
        {"-n"}, {"-i"}, {"-t"}, {"-s"}, {"--steps"}, {"--prompt"}, {"-n", "abc"}, {"-n", "1x"},
        {"-n", ""}, {"-n", " 5"}, {"-n", "-1"}, {"-n", "1.5"}, {"-n", "99999999999999999999"},
        {"-n", "2000000000"}, {"-t", "nan"}, {"-t", "-0.1"}, {"-t", "inf"}, {"-t", "1e99"},
        {"-t", "1,5"}, {"-t", "x"}, {"-p", "1.01"}, {"-p", "-1"}, {"-p", "nan"}, {"-s", "-1"},
        {"-s", "99999999999999999999"}, {"-s", "1.0"}, {"-s", "x"}, {"-s", ""}, {"-c", "-5"},
        {"-c", "x"}, {"-c", "99999999"}, {"-j", "0"}, {"-j", "-2"}, {"-j", "1000"}, {"-j", "two"},
        {"--top-k", "-1"}, {"--top-k", "1e3"}, {"--min-p", "2"}, {"--repeat-penalty", "0"},
        {"--repeat-penalty", "nan"}, {"-x"}, {"--unknown"}, {"--"}, {"-ii"}, {"--steps=x"},
        {"--steps="}, {"--quiet=1"}, {"--step", "5"}, {"another.bin"}, {"-m", "unknown"},
        {"-m", ""}, {"-m", "Generate"}, {"-i", "a", "-f", "b"},
        {"-i", "a", "-o", ""},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const char *arguments[8] = {model};
        char what[100];
        int n = 1;
        for (int j = 0; j < 4 && wrong[i][j]; j++) arguments[n++] = wrong[i][j];
        snprintf(what, sizeof what, "%s %s", wrong[i][0], wrong[i][1] ? wrong[i][1] : "");
        refused(run_program((How){0}, arguments), 2, what);
    }
    refused(run_program((How){0}, (const char *[]){NULL}), 2, "no model");
    refused(RUN("-n", "5"), 2, "no model but an option");
}

static void test_output_file(const char *model) {
    const char *out = in_folder("out.bin");
    Ran r = RUN(model, "-m", "logits", "-i", "1 2 3", "-o", out);
    Buffer b = slurp(out);
    CHECK(r.status == 0 && r.out.n == 0 && b.n == 3 * 278 * 4,
          "-o writes to a file instead of stdout: %s", r.err.p);
    free_ran(&r);
    r = RUN(model, "-m", "logits", "-i", "1 2 3");
    CHECK(r.out.n == b.n && !memcmp(r.out.p, b.p, b.n),
          "and writes there what it writes to stdout");
    free_ran(&r);
    Buffer whole = slurp(model);
    refused(RUN(model, "-m", "logits", "-i", "1 2 3", "-o", model), 2,
            "an output that is the model");
    Buffer still = slurp(model);
    CHECK(still.n == whole.n && !memcmp(still.p, whole.p, whole.n), "and the model is untouched");
    free(whole.p), free(still.p);
    Made m = tiny_model(LLAMA, F32);
    ((float *)(void *)m.final_norm.bytes)[3] = INFINITY;
    Buffer bad = version_3(&m);
    const char *path = saved("infinite.bin", &bad, bad.n);
    int before = files_in_folder();
    refused(RUN(path, "-m", "logits", "-i", "1 2 3", "-o", out), 1, "a failing model");
    Buffer after = slurp(out);
    CHECK(after.n == b.n && !memcmp(after.p, b.p, b.n),
          "a failure leaves the old output file as it was");
    unlink(out);
    refused(RUN(path, "-m", "logits", "-i", "1 2 3", "-o", out), 1, "a failing model");
    CHECK(access(out, F_OK) && files_in_folder() == before - 1,
          "and no new one, not even a part of one");
    refused(RUN(model, "-m", "logits", "-i", "1", "-o", in_folder("no/such/folder")), 1,
            "an output in a missing folder");
    mkdir(in_folder("directory"), 0700);
    before = files_in_folder();
    r = RUN(model, "-m", "logits", "-i", "1", "-o", in_folder("directory"));
    CHECK(strstr((char *)r.err.p, "Is a directory"), "a directory is no output: %s", r.err.p);
    refused(r, 1, "a directory as output");
    CHECK(files_in_folder() == before, "and nothing is left of it");
    const char *null = in_folder("null");
    if (symlink("/dev/null", null)) return;
    r = RUN(model, "-m", "logits", "-i", "1", "-o", null);
    struct stat st;
    CHECK(r.status == 0 && !stat(null, &st) && S_ISCHR(st.st_mode),
          "a device as output is written to, not replaced: "
          "status %d, %s",
          r.status, r.err.p);
    free_ran(&r);
    free(b.p), free(after.p), free(bad.p), free_made(&m);
}

static void test_input(const char *model) {
    const char *text = "abc caf\xc3\xa9 <s> 12";
    Ran r = RUN(model, "-m", "tokenize", "-i", text);
    CHECK(r.status == 0 && lines(&r.out) == 1, "tokenize takes a prompt: %s", r.err.p);
    const char *expected = (char *)r.out.p;
    How how = {.input = text};
    prints(RUN_AS(how, model, "-m", "tokenize", "-i", "-"), expected, "-i - is stdin");
    prints(RUN_AS(how, model, "-m", "tokenize", "-f", "-"), expected, "-f - is stdin");
    prints(RUN(model, "-m", "tokenize", "-f", save("prompt", text, strlen(text))), expected,
           "-f reads a file");
    prints(RUN("--mode=tokenize", "--prompt", text, model), expected,
           "long names and any order do the same");
    free_ran(&r);
    prints(RUN(model, "-m", "tokenize"), "\n", "no prompt has no tokens");
    refused(RUN(model, "-m", "tokenize", "-f", in_folder("nothing")), 1, "a missing prompt file");
    refused(RUN(model, "-m", "tokenize", "-f", folder), 1, "a directory as prompt");
    char *more = get(3000, 1);
    for (int i = 0; i < 2900; i++) more[i] = i % 2 ? '?' : 'e';
    refused(RUN(model, "-i", more, "-n", "5"), 1, "a prompt longer than the context");
    refused(RUN(model, "-i", "eeeeeeeeee", "-c", "5"), 1, "a prompt longer than -c");
    refused(RUN(model, "-i", "e", "-c", "701"), 1, "a context longer than the model's");
    free(more);
    refused(RUN_AS(how, model, "-m", "tokenize", "-f", "-", "-o", in_folder("stdin")), 2,
            "an output that is the file behind stdin");
    static const char *const bad[] = {"1 2 x", "-1", "278", "1 2 99999999999999999999", "1,2", "",
                                      "1.5", "0x10"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(RUN(model, "-m", "logits", "-i", bad[i]), 1, "logits of what is not a list of ids");
    refused(RUN(model, "-m", "eval"), 1, "evaluation of nothing");
    refused(RUN(model, "-m", "decompress", "-i", "a\nb"), 1, "a text of two lines to decompress");
}

static void test_generation(const char *model) {
    How closed = {.closed_pipe = true};
    Ran r = RUN_AS(closed, model, "-i", "abc", "-n", "200", "-s", "1");
    CHECK(r.status == 0 && r.signal == 0,
          "a closed pipe ends generation quietly: status %d, signal %d, %s", r.status, r.signal,
          r.err.p);
    free_ran(&r);
    r = RUN_AS(closed, model, "-m", "logits", "-i", "1 2 3");
    CHECK(r.status == 0 && r.signal == 0, "and so with logits: status %d, signal %d", r.status,
          r.signal);
    free_ran(&r);

    Ran first = RUN(model, "-i", "abc", "-n", "300", "-s", "5", "-j", "1", "--receipt", "-q");
    CHECK(first.status == 0 && first.out.n > 20 && !strncmp((char *)first.out.p, "abc", 3) &&
              lines(&first.err) == 1 && !strncmp((char *)first.err.p, "receipt: ", 9),
          "generate writes prompt and continuation, -q only the receipt: %s", first.err.p);
    static const char *const threads[] = {"2", "3", "64"};
    for (int i = 0; i < 3; i++) {
        r = RUN(model, "-i", "abc", "-n", "300", "-s", "5", "-j", threads[i], "--receipt", "-q");
        CHECK(r.out.n == first.out.n && !memcmp(r.out.p, first.out.p, r.out.n),
              "-j %s writes what -j 1 writes", threads[i]);
        CHECK(!strcmp((char *)r.err.p, (char *)first.err.p), "and has its receipt: %s", r.err.p);
        free_ran(&r);
    }
    r = RUN(model, "-i", "abc", "-n", "300", "-s", "6", "-q", "--receipt");
    CHECK(r.out.n != first.out.n || memcmp(r.out.p, first.out.p, r.out.n),
          "another seed writes another text");
    CHECK(strcmp((char *)r.err.p, (char *)first.err.p), "and has another receipt");
    free_ran(&r), free_ran(&first);
    r = RUN(model, "-i", "abc", "-n", "5");
    unsigned long long seed = 0;
    char *at = strstr((char *)r.err.p, "seed: ");
    CHECK(at && sscanf(at, "seed: %llu", &seed) == 1 && seed, "a seed from the clock is told: %s",
          r.err.p);
    char number[30];
    snprintf(number, sizeof number, "%llu", seed);
    prints(RUN(model, "-i", "abc", "-n", "5", "-s", number), (char *)r.out.p,
           "and writes the same text when given");
    free_ran(&r);
    prints(RUN(model, "-i", "abc", "-n", "5", "-t", "0", "-q"),
           (char *)(r = RUN(model, "-i", "abc", "-n", "5", "-t", "0", "-s", "9")).out.p,
           "temperature 0 needs no seed");
    free_ran(&r);
    first = RUN(model, "-i", "abc", "-n", "0", "-s", "3");
    CHECK(first.status == 0, "-n 0 goes on to the end: %s", first.err.p);
    free_ran(&first);

    save_endless();
    const char *endless = in_folder("endless.bin");
    r = RUN_AS(((How){.interrupt_at = 300}), endless, "-i", "abc", "-n", "0", "-s", "1", "-j", "2");
    CHECK(r.status == 130 && r.signal == 0 && r.out.n >= 300 && r.out.p[r.out.n - 1] == '\n',
          "Ctrl-C ends the text, with status 130: %d, signal %d, %zu bytes", r.status, r.signal,
          r.out.n);
    free_ran(&r);
    r = RUN(endless, "-i", "abc", "-n", "10", "-s", "1", "-c", "20", "-q");
    Ran same = RUN(endless, "-i", "abc", "-n", "10", "-s", "1", "-q");
    CHECK(r.status == 0 && r.out.n == same.out.n && !memcmp(r.out.p, same.out.p, r.out.n),
          "-c does not change the text");
    free_ran(&r), free_ran(&same);
#if defined __SANITIZE_ADDRESS__
#define NO_LIMIT 1
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define NO_LIMIT 1
#endif
#endif
#ifdef NO_LIMIT
    skip(2, "limited memory: address sanitizers need a lot of it");
#else
    refused(RUN_AS(((How){.memory = 60u << 20}), endless, "-i", "abc", "-j", "1"), 1,
            "a KV cache that does not fit");
    survived(RUN_AS(((How){.memory = 60u << 20}), model, "-i", "abc", "-j", "64", "-q"),
             "64 threads in little memory");
#endif
}

static void test_command_line(void) {
    if (no_program()) return;
    Buffer tiny = save_tiny();
    const char *model = in_folder("tiny.bin");
    static const char *const informing[] = {"--help", "-h", "--version", "-V"};
    for (int i = 0; i < 4; i++) {
        Ran r = RUN(informing[i]);
        CHECK(r.status == 0 && r.err.n == 0 && r.out.n > 5, "%s is printed to stdout: status %d",
              informing[i], r.status);
        free_ran(&r);
    }
    test_refused_options(model);
    test_output_file(model);
    test_input(model);
    test_generation(model);
    Ran one = RUN(model, "-m", "logits", "-i", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
                  "-j", "1");
    for (int i = 2; i < 4; i++) {
        Ran r = RUN(model, "-m", "logits", "-i",
                    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "-j", i == 2 ? "2" : "3");
        CHECK(one.out.n == 20 * 278 * 4 && r.out.n == one.out.n &&
                  !memcmp(r.out.p, one.out.p, r.out.n),
              "-m logits is the same with -j %d", i);
        free_ran(&r);
    }
    free_ran(&one);
    Ran r = RUN(model, "-m", "eval", "-i", "abc bad cab, a bad abc; 12 cabs", "-q");
    double bits = 0;
    CHECK(r.status == 0 && sscanf((char *)r.out.p, "bits_per_byte: %lf", &bits) == 1 && bits > 1 &&
              bits < 20,
          "-m eval gives bits per byte: %s%s", r.out.p, r.err.p);
    free_ran(&r);
    free(tiny.p);
}

// =================================================================================================
// 9. Decoders: samples, speculation, a full context, sessions, tools, chat
// =================================================================================================

#define GOLDEN 0x9E3779B97F4A7C15u

// Continues `prompt` by `steps` tokens by hand: a fresh cache for every token that follows a cut.
// The model's greedy choice; a full context keeps `keep` tokens and the newest half.
static Ids by_hand(const Model *m, const Tokenizer *t, const char *prompt, int ctx, int keep,
                   int steps, uint64_t *receipt) {
    Ids ids = ids_of(t, prompt, strlen(prompt), NULL, true);
    uint64_t sum = 0, words = 0;
    size_t vocab = (size_t)m->c.vocab_size;
    Cache kv;
    int done = 0;
    new_cache(&kv, m, ctx, 0, 0);
    for (int i = 0; i < steps; i++) {
        if ((int)ids.n > ctx) {
            int half = ctx / 2, from = (int)ids.n - half;
            if (keep > ctx - half - 1) keep = ctx - half - 1;
            for (int j = 0; j < half; j++) ids.ids[keep + j] = ids.ids[from + j];
            ids.n = (size_t)(keep + half);
            free_cache(&kv);
            new_cache(&kv, m, ctx, 0, 0);
            done = 0;
        }
        const float *logits = prefill(m, &kv, 0, ids.ids, done, (int)ids.n);
        done = (int)ids.n;
        sum += hash_words(logits, vocab * 4, words), words += (vocab + 1) / 2;
        push(&ids, argmax(logits, m->c.vocab_size));
    }
    free_cache(&kv);
    *receipt = mix64(sum + words);
    return ids;
}

static void test_full_context(void) {
    Model m;
    Tokenizer t = {0};
    load_model(&m, in_folder("endless.bin"));
    find_tokenizer(&t, NULL, &m);
    static const int contexts[] = {2, 3, 4, 5, 6, 7, 16, 33, 40, 64};
    for (size_t i = 0; i < sizeof contexts / sizeof *contexts; i++) {
        Options o = {.prompt = "abc d", .steps = 150, .context = contexts[i], .threads = 1,
                     .repeat_penalty = 1, .receipt = true, .quiet = true};
        uint64_t receipt;
        if (contexts[i] < 5) o.prompt = "a";
        Ids expected = by_hand(&m, &t, o.prompt, contexts[i], 4, 150, &receipt);
        Output out = {.fd = -1};
        Machine w;
        Decoder d;
        open_machine(&w, &d, &o, &m, &t, &out);
        encode(&t, (Text){o.prompt, contexts[i] < 5 ? 1 : 5}, NULL, true, &d.ids);
        d.keep = 4;
        d.budget = 150;
        run_decoders(&w, &d, 1);
        CHECK(equal_ids(&d.ids, expected.ids, expected.n) &&
                  mix64(d.receipt + d.words) == receipt && w.shifted,
              "with a context of %d, the text beyond it is that of fresh runs on the kept tokens",
              contexts[i]);
        close_machine(&w, &d);
        free(expected.ids);
        free(out.memory);
    }
    free_tokenizer(&t);
    free_model(&m);
}

// The same command with other options must print the same bytes.
static void same_text(const Ran *expected, Ran r, const char *what) {
    CHECK(r.status == 0 && r.out.n == expected->out.n &&
              !memcmp(r.out.p, expected->out.p, r.out.n),
          "%s: the same text:%s status %d, %zu of %zu bytes, %.200s", what, r.command, r.status,
          r.out.n, expected->out.n, r.err.p);
    free_ran(&r);
}

static void test_samples(const char *endless) {
    survived(RUN(endless, "-i", "a", "-c", "1", "-n", "9", "-q"), "a context of one token");
    static const char *const settings[][3] = {
        {"1", "0.9", "0"}, {"0.7", "1", "0"}, {"1", "1", "40"}, {"0", "0.9", "40"}};
    for (int s = 0; s < 4; s++) {
        const char *t = settings[s][0], *p = settings[s][1], *c = settings[s][2];
        Ran all = RUN(endless, "-i", "abc", "-n", "70", "-s", "77", "-t", t, "-p", p, "-c", c, "-k",
                      "5", "-j", "2", "--receipt");
        size_t at = 0, best_at = 0, best_n = 0;
        double best = -1e9;
        char *err = (char *)all.err.p;
        for (int i = 0; i < 5; i++) {
            char seed[30], receipt[60] = "";
            snprintf(seed, sizeof seed, "%llu", (unsigned long long)(77 + (uint64_t)i * GOLDEN));
            Ran one = RUN(endless, "-i", "abc", "-n", "70", "-s", seed, "-t", t, "-p", p, "-c", c,
                          "-j", "1", "--receipt", "-q");
            CHECK(one.status == 0 && at + one.out.n <= all.out.n &&
                      !memcmp(all.out.p + at, one.out.p, one.out.n),
                  "sample %d is the run with seed %s (temperature %s, context %s)", i, seed, t, c);
            double likely = 0;
            char *header = strstr(err, "sample "), *mean = header ? strstr(header, "ity ") : NULL;
            CHECK(header && mean && strstr(header, seed) && sscanf(mean, "ity %lf", &likely) == 1,
                  "its header names its seed and likelihood: %.100s", err);
            char *line = strstr(err, "receipt: ");
            if (line) snprintf(receipt, sizeof receipt, "%.26s", line);
            CHECK(line && !strcmp(receipt, (char *)one.err.p), "and it has the same receipt: %s %s",
                  receipt, one.err.p);
            err = line ? line + 9 : err;
            if (likely > best) best = likely, best_at = at, best_n = one.out.n;
            at += one.out.n;
            free_ran(&one);
        }
        CHECK(at == all.out.n, "and nothing else is printed");
        Ran b = RUN(endless, "-i", "abc", "-n", "70", "-s", "77", "-t", t, "-p", p, "-c", c, "-k",
                    "5", "-b");
        CHECK(b.out.n == best_n && !memcmp(b.out.p, all.out.p + best_at, best_n),
              "-b prints the likeliest");
        free_ran(&b), free_ran(&all);
    }
    Ran many = RUN(endless, "-i", "abc", "-n", "3", "-s", "1", "-k", "256", "-q");
    CHECK(many.status == 0 && lines(&many.out) >= 256, "256 samples at once");
    free_ran(&many);
    Ran tiny = RUN(in_folder("tiny.bin"), "-i", "ab", "-n", "40", "-s", "5", "-k", "2", "-q");
    Ran one = RUN(in_folder("tiny.bin"), "-i", "ab", "-n", "40", "-s", "5", "-q");
    CHECK(one.out.n <= tiny.out.n && !memcmp(one.out.p, tiny.out.p, one.out.n),
          "samples may end at different times");
    free_ran(&tiny), free_ran(&one);
}

// A text drafted where guesses cost nothing, so that many are made; draft NULL: without guesses.
static Output drafted(const Options *o, const char *draft, long long *proposed,
                      long long *accepted) {
    Model m;
    Tokenizer t = {0};
    Machine w;
    Decoder d;
    Output out = {.fd = -1};
    Options with = *o;
    with.draft = draft;
    load_model(&m, o->model);
    find_tokenizer(&t, NULL, &m);
    open_machine(&w, &d, &with, &m, &t, &out);
    encode(&t, (Text){o->prompt, strlen(o->prompt)}, NULL, true, &d.ids);
    d.keep = 4, d.budget = o->steps;
    w.draft.plain = 1e3, w.draft.more = 1, w.draft.plain_steps = FIRST_STEPS;  // seconds
    run_decoders(&w, &d, 1);
    *proposed = w.draft.proposed, *accepted = w.draft.accepted;
    uint64_t receipt = mix64(d.receipt + d.words);
    close_machine(&w, &d);
    char line[20];
    snprintf(line, sizeof line, "%016llx", (unsigned long long)receipt);
    write_text(&out, (Text){line, 16});
    free_tokenizer(&t), free_model(&m);
    return out;
}

static void test_speculation(const char *endless) {
    Vocabulary *v = tiny_vocabulary();  // another model with the same tokenizer
    v->n_stops = 0, v->stops.n = 0;
    Shape s = family(LLAMA, Q4);
    s.vocab = 278, s.layers = 1, s.seq_len = 60;
    Made m = make_weights(&s);
    Buffer b = version_3(&m), t = tokenizer_file(v);
    const char *other = save("other.bin", b.p, b.n);
    save("other.tok", t.p, t.n);
    static const char *const settings[][3] = {{"0", "1", "0"}, {"1", "0.9", "0"}, {"0.5", "1", "0"},
                                              {"0", "1", "40"}, {"1", "1", "40"}};
    for (int i = 0; i < 5; i++) {
        const char *temp = settings[i][0], *p = settings[i][1], *c = settings[i][2];
#define SPEAK(...) RUN(endless, "-i", "abc abc abc", "-n", "150", "-s", "9", "-t", temp, "-p", p,  \
                       "-c", c, "--receipt", __VA_ARGS__)
        Ran plain = SPEAK("-q"), same = SPEAK("-d", endless);
        Options o = {.model = endless, .prompt = "abc abc abc", .steps = 150, .seed = 9,
                     .threads = 1, .temperature = (float)atof(temp),
                     .top_p = (float)atof(p), .context = atoi(c), .repeat_penalty = 1,
                     .receipt = true, .quiet = true};
        long long proposed, accepted;
        Output alone = drafted(&o, NULL, &proposed, &accepted);
        const char *const drafts[] = {endless, other, "lookup"};
        for (int j = 0; j < 3; j++) {
            Output with = drafted(&o, drafts[j], &proposed, &accepted);
            CHECK(with.n == alone.n && !memcmp(with.memory, alone.memory, alone.n),
                  "temperature %s, context %s, drafted by %s: the same text and receipt", temp, c,
                  drafts[j]);
            CHECK(j ? proposed > 10 : proposed > 100 && accepted == proposed,
                  "%s: %lld guesses, %lld accepted", drafts[j], proposed, accepted);
            free(with.memory);
        }
        free(alone.memory);
        same_text(&plain, same, "drafted by itself");
        same_text(&plain, SPEAK("-q", "-d", other), "drafted by another model");
        same_text(&plain, SPEAK("-q", "-d", "lookup"), "drafted by lookup");
        Ran r = SPEAK("-q", "-d", "lookup", "-j", "3");
        CHECK(!strcmp((char *)r.err.p, (char *)plain.err.p), "with the same receipt");
        free_ran(&r), free_ran(&plain);
#undef SPEAK
    }
    refused(RUN(endless, "-i", "a", "-d", in_folder("nothing.bin")), 1, "a missing draft model");
    set32(b.p + 28, 277), seal(&b);
    refused(RUN(endless, "-i", "a", "-d", save("other.bin", b.p, b.n)), 1, "a damaged draft model");
    free(b.p), free(t.p), free_made(&m), free_vocabulary(v);

    Draft f = {.plain = 0.02, .more = 0.002, .plain_steps = FIRST_STEPS, .of = {1, 1}};
    for (int i = 0; i < 20; i++) measure(&f, 4, 4, 0.03, true);
    CHECK(f.lost == 0 && hit(&f, 0) > 0.95, "right guesses lose nothing");
    measure(&f, 4, 4, 60, true);
    CHECK(f.lost <= 4 * 2 * 0.02, "a step that was held up is not charged to the guesses");
    double lost = f.lost;
    measure(&f, 4, 0, 60, false);
    CHECK(f.lost == lost, "nor is one that read a prompt");
    for (int i = 0; i < 20; i++) measure(&f, 1, 0, 0.025, true);
    CHECK(fabs(f.lost - lost - 20 * 0.005) < 1e-9 && hit(&f, 0) < 0.5, "wrong guesses are charged");
    float logits[] = {1, 3, 2.9f, -1};
    CHECK(lead_of(logits, 4, 1) == 3 && lead_of(logits, 4, 2) == 2 && lead_of(logits, 4, 3) == 1 &&
              lead_of(logits + 1, 1, 0) == LEADS - 1, "the classes of leads");

    Decoder d = {0};
    int text[] = {1, 2, 3, 4, 5, 9, 1, 2, 3}, guess[20];
    for (int i = 0; i < 9; i++) push(&d.ids, text[i]);
    CHECK(look_back(&d, guess, 8) == 8 && guess[0] == 4 && guess[1] == 5 && guess[2] == 9 &&
              guess[5] == 3 && guess[6] == 4, "lookup finds what followed the last tokens before");
    d.ids.n = 8;
    d.ids.ids[7] = 7;
    CHECK(look_back(&d, guess, 8) == 0, "and guesses nothing without such a place");
    free(d.ids.ids);
}

// Appends what r printed, without the newline at its end.
static void add_printed(Buffer *all, Ran r) {
    CHECK(r.status == 0 && r.out.n > 0, "a session goes on:%s status %d, %.200s", r.command,
          r.status, r.err.p);
    if (r.out.n) put(all, r.out.p, r.out.n - 1);
    free_ran(&r);
}

static void test_sessions(const char *endless) {
    static const char *const settings[][2] = {{"0", "999"}, {"0", "40"}, {"0.8", "999"},
                                              {"1", "50"}};
    for (int i = 0; i < 4; i++) {
        const char *t = settings[i][0], *c = settings[i][1], *kv = in_folder("session");
        for (int draft = 0; draft < 2; draft++) {
            unlink(kv);
            Ran whole = RUN(endless, "-i", "abc", "-n", "100", "-s", "4", "-t", t, "-c", c, "-q");
            Buffer all = {0};
            const char *d = draft ? "-d" : "-q", *l = draft ? "lookup" : "-q";
            add_printed(&all, RUN(endless, "-S", kv, "-i", "abc", "-n", "1", "-s", "4", "-t", t,
                                  "-c", c, "-q", d, l));
            add_printed(&all, RUN(endless, "-S", kv, "-n", "60", "-t", t, "-q", d, l));
            add_printed(&all, RUN(endless, "-S", kv, "-n", "7", "-t", t, "-c", c, "-q", d, l));
            add_printed(&all, RUN(endless, "-S", kv, "-n", "32", "-t", t, "-q", d, l));
            CHECK(all.n == whole.out.n - 1 && !memcmp(all.p, whole.out.p, all.n),
                  "four runs on a session write what one run does (temperature %s, context %s): "
                  "%zu of %zu bytes", t, c, all.n, whole.out.n);
            free(all.p), free_ran(&whole);
        }
    }
    const char *kv = in_folder("session");
    unlink(kv);
    Ran whole = RUN(endless, "-m", "logits", "-i", "1 2 3 4 5 6 7");
    Buffer all = {0};
    Ran rest = RUN(endless, "-m", "logits", "-S", kv, "-i", "1 2 3", "-c", "2000");
    put(&all, rest.out.p, rest.out.n);
    free_ran(&rest);
    rest = RUN(endless, "-m", "logits", "-S", kv, "-i", "4 5 6 7");
    CHECK(all.n + rest.out.n == whole.out.n && !memcmp(whole.out.p, all.p, all.n) &&
              !memcmp(whole.out.p + all.n, rest.out.p, rest.out.n),
          "logits in two runs are the same");
    free_ran(&rest), free_ran(&whole), free(all.p);
    unlink(kv);
    rest = RUN(endless, "-S", kv, "-i", "x<think>y", "-n", "5", "-s", "1");
    free_ran(&rest), rest = RUN(endless, "-S", kv, "-n", "5", "-s", "1");
    CHECK(rest.status == 0 && rest.out.n == 1, "a thought may begin in an earlier run: %s",
          rest.out.p);
    free_ran(&rest), unlink(kv);
    Ran ids = RUN(endless, "-m", "tokenize", "-i", "12*3");
    rest = RUN(endless, "-m", "logits", "-S", kv, "-i", (char *)ids.out.p, "-o", "/dev/null");
    free_ran(&rest), rest = RUN(endless, "-S", kv, "-i", "=", "-n", "1", "-T", "tr '*' x");
    CHECK(!strncmp((char *)rest.out.p, "=12x3\n", 6), "and a question: %s", rest.out.p);
    free_ran(&rest), free_ran(&ids), unlink(kv);

    Ran r = RUN(endless, "-S", kv, "-k", "3", "-b", "-n", "20", "-s", "3");
    CHECK(r.status == 0, "samples branch from a session: %s", r.err.p);
    free_ran(&r);
    Buffer before = slurp(kv);
    refused(RUN(in_folder("tiny.bin"), "-S", kv, "-n", "3"), 1, "a session of another model");
    refused(RUN(endless, "-S", kv, "-n", "3", "-c", "99"), 1, "a session with another context");
    refused(RUN(endless, "-S", in_folder("tiny.tok"), "-n", "3"), 1, "a file that is no session");
    refused(RUN(endless, "-S", folder, "-n", "3"), 1, "a folder as a session");
    refused(RUN(endless, "-S", kv, "-o", kv, "-n", "3"), 2, "a session as the output");
    int fd = open(kv, O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    CHECK(fcntl(fd, F_SETLK, &lock) == 0, "a session can be locked");
    refused(RUN(endless, "-S", kv, "-n", "3"), 1, "a session in use");
    close(fd);
    Buffer after = slurp(kv);
    CHECK(before.n == after.n && !memcmp(before.p, after.p, before.n),
          "a refused session is left untouched");
    free(after.p);
    // Any byte of the header changed: the session is refused and untouched, or it is the state that
    // does not count, and the text is the same.
    Ran right = RUN(endless, "-S", kv, "-n", "5", "-t", "0", "-q");
    for (size_t i = 0; i < sizeof(SessionHeader); i++) {
        uint8_t keep = before.p[i];
        before.p[i] ^= (uint8_t)(1 << i % 8);
        save("damaged", before.p, before.n);
        r = RUN(endless, "-S", in_folder("damaged"), "-n", "5", "-t", "0", "-q");
        after = slurp(in_folder("damaged"));
        bool untouched = r.status == 1 && one_line(&r) && before.n == after.n &&
                         !memcmp(before.p, after.p, before.n);
        CHECK(untouched || (r.status == 0 && i >= 40), "a header with byte %zu changed: %d, %s", i,
              r.status, r.err.p);
        before.p[i] = keep;
        free(after.p), free_ran(&r);
    }
    free_ran(&right);
    for (size_t cut = 1; cut < 30000 && cut < before.n; cut = cut * 3 + 1) {
        save("damaged", before.p, cut);
        refused(RUN(endless, "-S", in_folder("damaged"), "-n", "5", "-q"), 1,
                "a truncated session");
    }
    refused(RUN_AS(((How){.file_size = 20000}), endless, "-S", in_folder("new"), "-n", "3", "-q"),
            1, "a session on a full disk");
    const char *new = in_folder("new");
    Buffer once = {0}, again = {0};
    add_printed(&once, RUN(endless, "-S", new, "-i", "abc", "-n", "9", "-t", "0", "-q"));
    add_printed(&again, RUN(endless, "-i", "abc", "-n", "9", "-t", "0", "-q"));
    CHECK(once.n == again.n && !memcmp(once.p, again.p, once.n), "and can be used afterwards");
    // It says that it holds more than its context, and all its hashes are right.
    SessionHeader forged;
    memcpy(&forged, before.p, sizeof forged);
    for (int i = 0; i < 2; i++) {
        forged.states[i].n_ids = forged.states[i].n_done = forged.ctx + 1;
        seal_state(&forged.states[i]);
    }
    memcpy(before.p, &forged, sizeof forged);
    save("damaged", before.p, before.n);
    refused(RUN(endless, "-S", in_folder("damaged"), "-n", "5", "-q"), 1, "a forged session");
    unlink(new);  // a stream that is closed must not become the session's file
    for (int i = 0; i < 2; i++) {
        r = RUN_AS(((How){.no_output = i == 0}), endless, "-S", new, "-i", i ? "" : "abc", "-n",
                   "5", "-t", "0", "-q", "-c", "999");
        CHECK(r.status == (i == 0), "a session without stdout, %d: %s", i, r.err.p);
        free_ran(&r);
    }
    unlink(new);  // llama2.c's files count positions
    const char *old = in_folder("llama.bin"), *old_tok = in_folder("llama.tok");
    Buffer parts = {0}, at_once = {0};
    for (int i = 0; i < 2; i++)
        add_printed(&parts, RUN(old, "-z", old_tok, "-S", new, "-i", i ? "" : "abc", "-n",
                                i ? "10" : "30", "-t", "0.5", "-s", i ? "0" : "5", "-q"));
    add_printed(&at_once, RUN(old, "-z", old_tok, "-i", "abc", "-n", "30", "-t", "0.5", "-s", "5",
                              "-q"));
    CHECK(parts.n > at_once.n && !memcmp(parts.p, at_once.p, at_once.n),
          "a session of llama2.c's file goes on");
    at_once.n = 0;
    add_printed(&at_once, RUN(old, "-z", old_tok, "-i", "abc", "-n", "40", "-t", "0.5", "-s", "5",
                              "-q"));
    CHECK(parts.n == at_once.n && !memcmp(parts.p, at_once.p, parts.n),
          "and prints only what is new, and as much");
    free(once.p), free(again.p), free(parts.p), free(at_once.p), free(before.p);
}

// What a session of model `path` holds after a prompt of n tokens was interrupted in the middle.
static SessionState interrupted_session(const char *path, const char *session, int n, bool best) {
    Model m;
    Tokenizer t = {0};
    load_model(&m, path);
    find_tokenizer(&t, NULL, &m);
    Options o = {.session = session, .steps = 5, .threads = 1, .context = 600, .quiet = true,
                 .samples = best ? 2 : 0, .best = best};
    Output out = {.fd = -1};
    Machine w;
    Decoder d;
    open_machine(&w, &d, &o, &m, &t, &out);
    for (int i = 0; i < n; i++) push(&d.ids, i % 200);
    make_room(&w, &d);
    fill(&w, &d, (int)d.ids.n / 2);
    interrupted = SIGINT;
    d.budget = 5;
    if (best) continue_text(&w, &d);
    close_machine(&w, &d);
    interrupted = 0;
    open_machine(&w, &d, &o, &m, &t, &out);
    SessionState state = w.session.now;
    close_machine(&w, &d);
    free(out.memory);
    free_tokenizer(&t);
    free_model(&m);
    return state;
}
// A text that has just filled its context, of which the last token is drawn but not computed.
static void full_session(const char *path, const char *session, int ctx) {
    Model m;
    Tokenizer t = {0};
    load_model(&m, path);
    find_tokenizer(&t, NULL, &m);
    Options o = {.session = session, .threads = 1, .context = ctx, .quiet = true};
    Output out = {.fd = -1};
    Machine w;
    Decoder d;
    open_machine(&w, &d, &o, &m, &t, &out);
    for (int i = 0; i < 5; i++) push(&d.ids, 40 + i);
    d.budget = ctx - 5 + 1;
    continue_text(&w, &d);
    CHECK(d.ids.n == (size_t)ctx + 1 && d.done == ctx, "a full context: %zu tokens", d.ids.n);
    interrupted = SIGINT;
    close_machine(&w, &d);
    interrupted = 0;
    free(out.memory);
    free_tokenizer(&t);
    free_model(&m);
}
static void test_full_session(const char *endless) {
    const char *kv = in_folder("full");
    for (int ctx = 256; ctx <= 300; ctx += 44) {
        unlink(kv);
        full_session(endless, kv, ctx);
        Buffer before = slurp(kv);
        refused(RUN(endless, "-S", kv, "-m", "logits", "-i", "1"), 1, "logits behind a full text");
        Buffer after = slurp(kv);
        CHECK(before.n == after.n && !memcmp(before.p, after.p, before.n), "leave it as it is");
        free(before.p), free(after.p);
        Ran r = RUN(endless, "-S", kv, "-n", "0", "-q");
        CHECK(r.status == 0 && r.out.n > 40, "-n 0 makes room in it: %zu bytes", r.out.n);
        free_ran(&r);
    }
    unlink(kv);
}

// Without closing the file, which would unlock it.
static Buffer get_file(int fd) {
    Buffer b = {0};
    char some[4096];
    for (ssize_t got; (got = pread(fd, some, sizeof some, (off_t)b.n)) > 0;)
        put(&b, some, (size_t)got);
    return b;
}

static void test_refused_session(const char *endless) {
    const char *kv = in_folder("refused");
    unlink(kv);
    refused(RUN(endless, "-S", kv, "-c", "4", "-i", "a bad cab, a dab"), 1, "a prompt too long");
    refused(RUN(endless, "-S", kv, "-d", in_folder("nothing"), "-i", "a"), 1, "no draft model");
    CHECK(access(kv, F_OK), "no session is left that holds nothing");
    Ran r = RUN(endless, "-S", kv, "-c", "300", "-n", "3", "-i", "a", "-q");
    CHECK(r.status == 0 && !access(kv, F_OK), "what is made in the end: %s", r.err.p);
    free_ran(&r);
    // Another program has it open: here the tests themselves.
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(kv, O_RDWR);
    if (fcntl(fd, F_SETLK, &lock)) abort();
    Buffer before = get_file(fd);
    char input[700];
    snprintf(input, sizeof input, "ab\n/save %.300s\n/load %.300s\n", kv, kv);
    r = RUN_AS(((How){.input = input}), endless, "-m", "chat", "-c", "300", "-n", "3", "-q");
    const char *first = strstr((char *)r.err.p, "is in use");
    CHECK(r.status == 0 && first && strstr(first + 1, "is in use"),
          "a session that is open is neither saved to nor loaded: %s", r.err.p);
    Buffer after = get_file(fd);
    CHECK(before.n == after.n && !memcmp(before.p, after.p, before.n), "it is as it was");
    free_ran(&r), free(before.p), free(after.p);
    close(fd), unlink(kv);
    snprintf(input, sizeof input, "ab\n/save -\n/save  %.300s \n", kv);
    Ran alone = RUN_AS(((How){.input = "ab\n"}), endless, "-m", "chat", "-n", "3", "-t", "0", "-q");
    r = RUN_AS(((How){.input = input}), endless, "-m", "chat", "-n", "3", "-t", "0", "-q");
    CHECK(strstr((char *)r.err.p, "needs a file") && !access(kv, F_OK),
          "/save: stdout is no file, and blanks are not part of a name: %s", r.err.p);
    same_text(&alone, r, "nor is anything of it printed");
    free_ran(&alone), unlink(kv);
}

static void test_same_file(void) {
    char here[300], away[400];
    if (!getcwd(here, sizeof here)) abort();
    snprintf(away, sizeof away, "%s/not-there", here);
    CHECK(same_file("not-there", away) && same_file("./not-there", ".//not-there") &&
              same_file("README.md", "./README.md"), "other spellings of a name");
    CHECK(!same_file("not-there", "/dev/not-there") && !same_file("-", "-") &&
              !same_file("not-there", "not-here") && !same_file("README.md", "not-there") &&
              !same_file("no/not-there", "nor/not-there"), "and other files");
}

static void test_interrupted_session(const char *endless) {
    const char *kv = in_folder("interrupted");
    unlink(kv);
    refused(RUN(endless, "-S", kv, "-o", kv, "-i", "a"), 2, "a new session that is the output too");
    for (int best = 0; best < 2; best++) {
        SessionState s = interrupted_session(endless, kv, 500, best);
        CHECK(!s.n_ids, "a prompt is part of a session when it is computed: %d tokens", s.n_ids);
    }
    Ran r = RUN(endless, "-S", kv, "-i", "abc", "-n", "9", "-c", "600", "-q");
    SessionState s = interrupted_session(endless, kv, 700, false);
    CHECK(r.status == 0 && s.n_ids >= 300 && s.n_done < s.n_ids,
          "what a full context keeps is not lost while it is computed again: %d of %d tokens",
          s.n_done, s.n_ids);
    free_ran(&r), unlink(kv);
}

// Waits until the program catches SIGINT: before that a signal ends it like any other program.
static bool catches_signals(pid_t pid) {
    char path[60], line[200];
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
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

// The best sample becomes the session's text: its tokens are those of what was printed.
static void test_best_in_session(const char *endless) {
    Model m;
    Tokenizer t = {0};
    Cache kv;
    SessionState s;
    Buffer printed = {0}, kept = {0};
    const char *path = in_folder("new");
    unlink(path);
    add_printed(&printed, RUN(endless, "-S", path, "-i", "abc", "-n", "20", "-s", "3", "-k", "3",
                              "-b", "-q", "-c", "999"));
    add_printed(&printed, RUN(endless, "-S", path, "-n", "20", "-t", "0", "-q"));
    load_model(&m, endless);
    find_tokenizer(&t, NULL, &m);
    new_cache(&kv, &m, 999, 0, 0);
    Buffer file = slurp(path);
    Ids prompt = ids_of(&t, "abc", 3, NULL, true);
    if (CHECK(!check_session(file.p, file.n, &kv, true, &s) && s.n_ids == (int)prompt.n + 40,
              "-k -b keeps the best answer in the session")) {
        const int *ids = session_ids(file.p, 999, s.area);
        for (int i = 0; i < s.n_ids; i++) {
            Text piece = decode(&t, i ? ids[i - 1] : -1, ids[i]);
            put(&kept, piece.s, piece.len);
        }
        CHECK(kept.n == printed.n && !memcmp(kept.p, printed.p, kept.n),
              "and its tokens are what was printed");
    }
    free(printed.p), free(kept.p), free(file.p), free(prompt.ids);
    free_cache(&kv), free_tokenizer(&t), free_model(&m);
}

// Whether the session in a file is a beginning of the expected text, with the very keys and values
// that a fresh pass over its tokens gives. *n: its tokens.
static bool whole_session(const char *path, const Model *m, int ctx, const Ids *expected, int *n) {
    Buffer file = slurp(path);
    Cache cache;
    SessionState s;
    new_cache(&cache, m, ctx, 0, 0);
    bool whole = !check_session(file.p, file.n, &cache, true, &s);
    const int *ids = whole ? session_ids(file.p, ctx, s.area) : NULL;
    *n = whole ? s.n_ids : 0;
    whole = whole && s.n_done >= s.n_ids - 1 && (size_t)s.n_ids <= expected->n &&
            (!s.n_ids || !memcmp(ids, expected->ids, (size_t)s.n_ids * sizeof(int)));
    if (whole && s.n_done) prefill(m, &cache, 0, ids, 0, s.n_done);
    for (int pos = 0; whole && pos < s.n_done; pos++)
        for (int i = 0; i < m->c.n_layers * m->c.n_kv_heads; i++) {
            int at;
            const uint8_t *mine =
                cache_chunk(&cache, 0, pos, i / m->c.n_kv_heads, i % m->c.n_kv_heads, &at);
            const uint8_t *theirs = file.p + session_cache_at(ctx) + (mine - cache.data);
            Matrix k[2] = {cache_keys(&cache, mine), cache_keys(&cache, theirs)};
            Matrix v[2] = {cache_values(&cache, mine), cache_values(&cache, theirs)};
            for (int d = 0; d < m->c.head_dim; d++)
                whole &= weight(&k[0], at, d) == weight(&k[1], at, d) &&
                         weight(&v[0], d, at) == weight(&v[1], d, at);
        }
    free(file.p);
    free_cache(&cache);
    return whole;
}

// A run on a session is killed or interrupted at a random moment: what is left is whole, and the
// next run goes on from it.
static void test_kills(const char *endless) {
    enum { CTX = 1 << 13 };
    Model m;
    Tokenizer t = {0};
    load_model(&m, endless);
    find_tokenizer(&t, NULL, &m);
    uint64_t receipt;
    Ids expected = by_hand(&m, &t, "abc", CTX, 3, 6000, &receipt);
    const char *kv = in_folder("killed");
    int cut = 0;
    for (int round = 0, n = 0; round < 40; round++) {
        if (round % 10 == 0) unlink(kv), n = 0;
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            int null = open("/dev/null", O_RDWR);
            for (int i = 0; i < 3; i++) dup2(null, i);
            setenv("ASAN_OPTIONS", "detect_leaks=0", 1);
            execl(program(), program(), endless, "-S", kv, "-i", n ? "" : "abc", "-t", "0", "-n",
                  "500", "-c", "8192", "-d", round % 2 ? endless : "lookup", (char *)NULL);
            _exit(98);
        }
        int before = n, number = round % 4 < 2 ? SIGKILL : SIGINT;
        bool caught = catches_signals(pid);
        usleep((useconds_t)(500 + below(20000)));
        if (caught) kill(pid, number);
        waitpid(pid, NULL, 0);
        struct stat st;
        if (stat(kv, &st) || st.st_size == 0) continue;  // it had not begun
        CHECK(whole_session(kv, &m, CTX, &expected, &n),
              "a session is whole after signal %d: %d tokens, %d before", number, n, before);
        cut += n > before && n < before + 500;
        if (n < 3) {  // within the prompt, of which the rest would be missing
            unlink(kv), n = 0;
            continue;
        }
        Ran r = RUN(endless, "-S", kv, "-i", n ? "" : "abc", "-n", "2", "-t", "0", "-q");
        CHECK(r.status == 0 && whole_session(kv, &m, CTX, &expected, &n),
              "and goes on after %d tokens: status %d, %s", n, r.status, r.err.p);
        free_ran(&r);
    }
    CHECK(cut > 3, "sessions were cut while they were written: %d", cut);
    free(expected.ids);
    free_tokenizer(&t);
    free_model(&m);
}

static void test_tools(const char *endless) {
    static const struct { const char *text, *question, *before;
    } cases[] = {{"1234*4321=", "1234*4321", ""},
                 {"so 12 + 30 =", "12 + 30 ", " "},
                 {"1+1= ", "1+1", ""},
                 {"x\n(1+2)*3=", "(1+2)*3", ""},
                 {"1) 3+4=", "3+4", ""},
                 {"2*-3=", "2*-3", ""},
                 {"1.5*2=", "1.5*2", ""},
                 {"2^10%7=", "2^10%7", ""},
                 {"5=", "", ""},
                 {"x=", "", ""},
                 {"=", "", ""},
                 {"", "", ""},
                 {"1+1", "", ""},
                 {"1+1=2", "", ""},
                 {"1+=", "", ""},
                 {"(1+1=", "", ""},
                 {"1..2+1=", "", ""},
                 {"1+1\n=", "", ""},
                 {"a1+1=", "", ""},
                 {"1+1==", "", ""},
                 {"$3+4=", "3+4", ""},
                 {"1,234*2=", "", ""},
                 {"- 12*34=", "12*34", ""},
                 {"sqrt(16)+2*3=", "", ""},
                 {"3x+2*5=", "", ""},
                 {"y + 2 * 3 =", "", ""},
                 {"x-3*2=", "", ""},
                 {"http://a/page/3/2=", "", ""},
                 {"QUJD+12/34=", "", ""},
                 {"10:30-11=", "", ""},
                 {"is: -3*2=", "", ""},
                 {"((((=", "", ""},
                 {"-1-1=", "-1-1", ""},
                 {"say <tool_call>{\"a\": 1}</tool_call>", "{\"a\": 1}", "\n<tool_response>\n"},
                 {"{}</tool_call>", "", ""},
                 {"<tool_call>{}</tool_call> ", "", ""},
                 {"<tool_call>a<tool_call>b</tool_call>", "b", "\n<tool_response>\n"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *before, *after;
        Text q = find_question((Text){cases[i].text, strlen(cases[i].text)}, &before, &after);
        CHECK(q.len == strlen(cases[i].question) && !memcmp(q.s, cases[i].question, q.len) &&
                  (!q.len || !strcmp(before, cases[i].before)),
              "\"%s\" asks \"%s\", not \"%.*s\"", cases[i].text, cases[i].question, (int)q.len,
              q.s);
    }
    Ran r = RUN(endless, "-T", "sed 's/.*/<&>/'", "-i", "12*34=", "-n", "5", "-t", "0", "-q");
    CHECK(r.status == 0 && !strncmp((char *)r.out.p, "12*34=<12*34>\n", 14),
          "a tool's answer goes on the text: %.40s", r.out.p);
    Ran same = RUN(endless, "-i", "12*34=<12*34>\n", "-n", "5", "-t", "0", "-q");
    same_text(&same, r, "the model goes on from the answer");
    free_ran(&same);
    Ran alone = RUN(endless, "-i", "12*34=", "-n", "9", "-t", "0", "-q");
    static const char *const bad[] = {
        "exit 3",       "true", "cat >/dev/null", "sleep 30",
        "/nonexistent", "yes",  "kill -9 $$",     "echo; exec >&-; sleep 30"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double start = seconds();
        r = RUN(endless, "-T", bad[i], "-i", "12*34=", "-n", "9", "-t", "0", "-q");
        CHECK(strstr((char *)r.err.p, "run: the tool ") && seconds() - start < 9,
              "a bad tool is reported: %s: %s", bad[i], r.err.p);
        same_text(&alone, r, bad[i]);
    }
    free_ran(&alone);
    // The first sample draws "=" at once: what the tool says is longer than all the rest.
    static const char *const seeds[] = {"505", "11400714819323198990"};
    Ran both = RUN(endless, "-T", "yes 'a b c' | head -c 3000", "-i", "1+1", "-n", "4", "-k", "2",
                   "-c", "4000", "-t", "9", "-p", "1", "-s", seeds[0], "--receipt", "-q");
    Buffer singles[2] = {{0}, {0}};
    for (int i = 0; i < 2; i++) {
        r = RUN(endless, "-T", "yes 'a b c' | head -c 3000", "-i", "1+1", "-n", "4", "-c", "4000",
                "-t", "9", "-p", "1", "-s", seeds[i], "--receipt", "-q");
        put(&singles[0], r.out.p, r.out.n), put(&singles[1], r.err.p, r.err.n);
        free_ran(&r);
    }
    CHECK(!strncmp((char *)both.out.p, "1+1=a b c", 9) && both.out.n == singles[0].n &&
              !memcmp(both.out.p, singles[0].p, singles[0].n) && both.err.n == singles[1].n &&
              !memcmp(both.err.p, singles[1].p, singles[1].n),
          "samples in which a tool speaks at length are the single runs: %.60s", both.err.p);
    free(singles[0].p), free(singles[1].p), free_ran(&both);
    survived(RUN(endless, "-T", "yes 'a b c' | head -c 3000", "-i", "1+1=", "-n", "1", "-q", "-S",
                 in_folder("answered"), "-c", "300"), "an answer longer than the context");
    survived(RUN(endless, "-S", in_folder("answered"), "-n", "9", "-q"), "its session");
    for (int i = 0; i < 9; i++) {
        r = RUN(endless, "-T", "seq 2000", "-i", "1+1=", "-n", "1", "-t", "0");
        CHECK(strstr((char *)r.err.p, "says too much"), "an answer is not cut: %s", r.err.p);
        free_ran(&r);
    }
    r = RUN(endless, "-T", "sleep 8 & echo 7", "-i", "1+1=", "-n", "1", "-t", "0", "-q");
    CHECK(!strncmp((char *)r.out.p, "1+1=7", 5), "a tool may leave a child behind: %s", r.err.p);
    free_ran(&r);
    r = RUN(endless, "-T", "echo '$(touch x); `ls`'", "-i", "1+1=", "-n", "1", "-t", "0", "-q");
    CHECK(!strncmp((char *)r.out.p, "1+1=$(touch x); `ls`", 20), "an answer is only text: %s",
          r.out.p);
    free_ran(&r);

    Model m;
    Tokenizer t = {0};
    load_model(&m, endless);
    find_tokenizer(&t, NULL, &m);
    Options o = {.prompt = "",
                 .steps = 5,
                 .threads = 1,
                 .context = 500,
                 .tool = "echo '<s> 7'",
                 .quiet = true};
    Output out = {.fd = -1};
    Machine w;
    Decoder d;
    open_machine(&w, &d, &o, &m, &t, &out);
    write_output(&d.text, "1+1=", 4);
    use_tool(&w, &d);
    for (size_t i = 0; i < d.ids.n; i++)
        CHECK(d.ids.ids[i] != t.h.bos, "special tokens are not recognised in what a tool prints");
    CHECK(d.ids.n > 3 && out.n == 6 && !memcmp(out.memory, "<s> 7\n", 6), "its answer is shown");
    w.chatting = true;
    write_output(&d.text, "1+1=", 4);
    use_tool(&w, &d);
    CHECK(d.ids.ids[d.ids.n - 1] != 277, "in a chat the reply goes on behind a number");
    write_output(&d.text, "<tool_call>{}</tool_call>", 25);
    use_tool(&w, &d);
    CHECK(d.ids.ids[d.ids.n - 1] == 277, "in a chat the answer to a <tool_call> is a turn");
    close_machine(&w, &d);
    free(out.memory);
    free_tokenizer(&t);
    free_model(&m);
}

static Ran talk(const char *model, const char *input, const char *extra, const char *value) {
    return RUN_AS(((How){.input = input}), model, "-m", "chat", "-n", "12", "-t", "0", "-q", "-c",
                  "999", extra, value);
}
// A vocabulary that has no token for what a chat says.
static void test_wordless_chat(void) {
    Vocabulary *v = new_vocabulary(BYTE_LEVEL);
    Shape s = family(LLAMA, Q8);
    for (int i = 0; i < s.vocab; i++) token(v, "a", 1, 0, NORMAL);
    for (int i = 0; i < 10; i++) chat_piece(v, "Z");
    Made made = make_weights(&s);
    Buffer m = version_3(&made), t = tokenizer_file(v);
    save("wordless.bin", m.p, m.n), save("wordless.tok", t.p, t.n);
    refused(RUN_AS(((How){.input = "Z\n"}), in_folder("wordless.bin"), "-m", "chat", "-q"), 1,
            "a chat without a token");
    free(m.p), free(t.p), free_made(&made), free_vocabulary(v);
}

static void test_chat(const char *endless) {
    Ran one = talk(endless, "abc\n", "-s", "1");
    Ran direct = RUN(endless, "-i", "<s>abc<|end|>", "-n", "12", "-t", "0", "-q");
    size_t skip_n = strlen("<s>abc<|end|>");
    CHECK(one.status == 0 && one.out.n > 1 && one.out.n == direct.out.n - skip_n &&
              !memcmp(one.out.p, direct.out.p + skip_n, one.out.n),
          "a reply is what follows the rendered turn: %s", one.err.p);
    free_ran(&direct);
    direct = RUN(endless, "-i", "<s>system be<|end|><s>abc<|end|>", "-n", "12", "-t", "0", "-q");
    Ran r = talk(endless, "abc\n", "-y", "be");
    skip_n = strlen("<s>system be<|end|><s>abc<|end|>");
    CHECK(r.out.n == direct.out.n - skip_n && !memcmp(r.out.p, direct.out.p + skip_n, r.out.n),
          "-y is its system turn");
    free_ran(&r), free_ran(&direct);
    Ran two = talk(endless, "abc\ndef\n", "-s", "1");
    CHECK(two.out.n > one.out.n && !memcmp(two.out.p, one.out.p, one.out.n),
          "a second turn follows");
    same_text(&two, talk(endless, "abc\r\n\ndef", "-s", "1"), "empty lines and a missing newline");
    same_text(&two, talk(endless, "def\n", "-i", "abc"), "-i is the first turn");
    Buffer expected = {0};
    Ran other = talk(endless, "abc\nddd\n", "-s", "1");
    put(&expected, other.out.p, other.out.n);
    put(&expected, two.out.p + one.out.n, two.out.n - one.out.n);
    r = talk(endless, "abc\nddd\n/undo\ndef\n", "-s", "1");
    CHECK(r.out.n == expected.n && !memcmp(r.out.p, expected.p, r.out.n),
          "/undo takes a turn back: %s", r.err.p);
    free_ran(&r);
    r = talk(endless, "ddd\n/clear\nabc\ndef\n", "-s", "1");
    CHECK(r.out.n > two.out.n && !memcmp(r.out.p + r.out.n - two.out.n, two.out.p, two.out.n),
          "/clear begins anew");
    free_ran(&r);
    char input[1000];
    unlink(in_folder("saved"));
    snprintf(input, sizeof input, "abc\n/save %.300s\nddd\n/load %.300s\ndef\n",
             in_folder("saved"), in_folder("saved"));
    r = talk(endless, input, "-s", "1");
    CHECK(r.out.n == expected.n && !memcmp(r.out.p, expected.p, r.out.n),
          "/save and /load bring a conversation back: %s", r.err.p);
    free_ran(&r);
    r = talk(endless, "def\n", "-S", in_folder("saved"));
    CHECK(r.out.n == two.out.n - one.out.n && !memcmp(r.out.p, two.out.p + one.out.n, r.out.n),
          "-S goes on with a saved conversation: %s", r.err.p);
    free_ran(&r);
    unlink(in_folder("session"));
    r = talk(endless, "abc\n", "-S", in_folder("session"));
    same_text(&one, r, "a chat with a session");
    r = talk(endless, "def\n", "-S", in_folder("session"));
    CHECK(r.out.n == two.out.n - one.out.n && !memcmp(r.out.p, two.out.p + one.out.n, r.out.n),
          "a chat goes on in the next run");
    free_ran(&r);
    same_text(&two, talk(endless, "abc\ndef\n", "-d", "lookup"), "speculation in a chat");
    const char *full = in_folder("full"), *text = in_folder("text");
    unlink(full), unlink(text);
    char ids[257 * 2 + 1], command[400];
    for (int i = 0; i < 257; i++) ids[2 * i] = '5', ids[2 * i + 1] = ' ';
    ids[sizeof ids - 1] = 0;
    r = RUN(endless, "-m", "logits", "-S", full, "-c", "512", "-i", ids, "-o", "/dev/null");
    snprintf(command, sizeof command, "/load %.300s\nabc\n", full);
    Ran loaded = RUN_AS(((How){.input = command}), endless, "-m", "chat", "-n", "4", "-c", "256");
    CHECK(r.status == 0 && loaded.status == 0 && loaded.out.n > 1,
          "a conversation one token longer than the context is loaded: %s", loaded.err.p);
    free_ran(&r), free_ran(&loaded), unlink(full);
    snprintf(command, sizeof command, "abc\n/save %.300s\n", text);
    r = talk(endless, command, "-o", text);
    CHECK(r.status == 0 && strstr((char *)r.err.p, "is in use"), "/save leaves -o alone: %s",
          r.err.p);
    free_ran(&r), unlink(text);
    r = RUN_AS(((How){.input = "abc\n"}), endless, "-m", "chat", "-n", "4", "-s", "1", "-k", "2",
               "-b", "--receipt", "-q");
    CHECK(r.err.n == 2 * strlen("receipt: 0123456789abcdef\n"), "a receipt for each sample: %s",
          r.err.p);
    free_ran(&r);
    for (int n = 1; n <= 40; n++) {  // some replies end with one token more than the context holds
        char steps[8];
        const char *kv = in_folder("session"), *turns[] = {"abc\ndef\n", "abc\n", "def\n"};
        snprintf(steps, sizeof steps, "%d", n);
        Ran ran[3];
        for (int i = 0; i < 3; i++) {
            if (i < 2) unlink(kv);
            ran[i] = RUN_AS(((How){.input = turns[i]}), endless, "-m", "chat", "-q", "-t", "0",
                            "-n", steps, "-c", "40", "-S", kv);
        }
        CHECK(ran[0].out.n == ran[1].out.n + ran[2].out.n &&
                  !memcmp(ran[0].out.p, ran[1].out.p, ran[1].out.n) &&
                  !memcmp(ran[0].out.p + ran[1].out.n, ran[2].out.p, ran[2].out.n),
              "a chat of two turns of %d tokens, cut between them, is the same", n);
        for (int i = 0; i < 3; i++) free_ran(&ran[i]);
    }
    unlink(in_folder("session"));
    r = talk(endless, "abc\n/load /nowhere\n/save /nowhere/x\n/help\n/bad\ndef\n", "-s", "1");
    CHECK(strstr((char *)r.err.p, "run: cannot open /nowhere") &&
              strstr((char *)r.err.p, "Ctrl-D") &&
              strstr((char *)r.err.p, "/bad is not a command") &&
              strstr((char *)r.err.p, "run: cannot write /nowhere/x"),
          "wrong commands are answered: %s", r.err.p);
    same_text(&two, r, "and the chat goes on");
    snprintf(input, sizeof input, "abc\n/save %.300s\ndef\n", save("notes", "my notes\n", 9));
    r = talk(endless, input, "-s", "1");
    Buffer notes = slurp(in_folder("notes"));
    CHECK(strstr((char *)r.err.p, "notes is not a session") && notes.n == 9 &&
              !memcmp(notes.p, "my notes\n", 9),
          "/save leaves a file alone that is not a session: %s", r.err.p);
    free(notes.p);
    same_text(&two, r, "and that chat goes on");
    r = RUN_AS(((How){.input = "abc\ndef\n"}), endless, "-m", "chat", "-n", "12", "-s", "5", "-k",
               "4", "-b", "-q");
    Ran best = RUN(endless, "-i", "<s>abc<|end|>", "-n", "12", "-s", "5", "-k", "4", "-b", "-q");
    skip_n = strlen("<s>abc<|end|>");
    CHECK(r.status == 0 && r.out.n > best.out.n - skip_n &&
              !memcmp(r.out.p, best.out.p + skip_n, best.out.n - skip_n),
          "the best of four in a chat is that of the rendered turn: %s", r.err.p);
    free_ran(&r), free_ran(&best);
    r = talk(endless, "What is <think> for?\n", "-s", "1");
    CHECK(r.out.n > 1, "a user's <think> does not hide the answer");
    free_ran(&r);
    r = talk(endless, "abc\ndef\nabc\ndef\nabc\ndef\nabc\ndef\n", "-c", "40");
    CHECK(r.status == 0 && !memcmp(r.out.p, two.out.p, one.out.n), "a chat beyond its context: %s",
          r.err.p);
    free_ran(&r);
    char *longest = get(200002, 1);
    memset(longest, 'a', 200000);
    longest[200000] = '\n';
    r = talk(endless, longest, "-c", "1000");
    CHECK(r.status == 0 && r.out.n == 0 && one_line(&r), "a turn that cannot fit is left out: %s",
          r.err.p);
    free(longest), free_ran(&r);
    r = talk(endless, "abc\n/load /nowhere\n/save /nowhere/x\ndef\n", "-o", in_folder("said"));
    Buffer said = slurp(in_folder("said"));
    CHECK(r.status == 0 && said.n == two.out.n && !memcmp(said.p, two.out.p, said.n),
          "-o is whole after commands that failed: %s", r.err.p);
    free_ran(&r), free(said.p);
    snprintf(input, sizeof input, "abc\n/save %.300s\n/load %.300s\n/save %.300s\ndef\n",
             in_folder("session"), in_folder("session"), endless);
    Buffer before = slurp(endless);
    unlink(in_folder("session"));
    same_text(&two, talk(endless, input, "-S", in_folder("session")),
              "files in use are left alone");
    Buffer after = slurp(endless);
    CHECK(before.n == after.n && !memcmp(before.p, after.p, before.n), "and so is the model");
    free(before.p), free(after.p);
    free_ran(&one), free_ran(&two), free_ran(&other), free(expected.p);
    refused(RUN(in_folder("plain.bin"), "-m", "chat", "-i", "a"), 1, "chat without a chat format");
}

// What a text becomes on its way to stdout, in pieces of random lengths.
static void shows(const char *text, bool terminal, bool keep, const char *expected) {
    Options o = {.think = keep};
    for (int round = 0; round < 20; round++) {
        Output out = {.fd = -1, .terminal = terminal};
        start_thoughts(&out, &o, true, (Text){"", 0});
        for (size_t i = 0, n, len = strlen(text); i < len; i += n) {
            n = 1 + (size_t)below(round ? 9 : 1);
            if (n > len - i) n = len - i;
            write_reply(&out, (Text){text + i, n});
        }
        end_text(&out);
        CHECK(out.n == strlen(expected) && !memcmp(out.memory, expected, out.n),
              "\"%s\" is shown as \"%s\", not \"%.*s\"", text, expected, (int)out.n, out.memory);
        free(out.memory);
    }
}
static void test_display(void) {
    const char *text = "a<think>b <i>c</think>d</think><thi";
    shows(text, false, false, "ad</think><thi\n");
    shows(text, false, true, "a<think>b <i>c</think>d</think><thi\n");
    shows(text, true, false, "a\033[2m<think>b <i>c</think>\033[0md</think><thi\n");
    shows("<<think>x", false, false, "<\n");
    shows("x<think>", true, false, "x\033[2m<think>\033[0m\n");
    shows("\033[31mred\033[0m\a\r\n\t\x7f", true, false, "^[[31mred^[[0m^G^M\n\t^?\n");
    shows("\033[31mred", false, false, "\033[31mred\n");
    shows("\xc2\x9b"
          "1m \xc3\x9b \xe2\x82\xac",
          true, false,
          "\xc2\xa0"
          "1m \xc3\x9b \xe2\x82\xac\n");
    shows("\xc2" "A", true, false, "\xc2" "A\n");
    shows("caf\xc3\xa9 \xf0\x9f\x98\x80 \xf0\x9f", false, false,
          "caf\xc3\xa9 \xf0\x9f\x98\x80 \xf0\x9f\n");
    Options o = {0};
    Output out = {.fd = -1};
    start_thoughts(&out, &o, true, (Text){"x</think><think>\n", 17});
    write_reply(&out, (Text){"thought</think>said", 19});
    end_text(&out);
    CHECK(out.n == 5 && !memcmp(out.memory, "said\n", 5), "a prompt may open a thought");
    free(out.memory);
}

static void test_ensemble(const char *endless) {
    const char *tiny = in_folder("tiny.bin");
    Ran first = RUN(endless, "-i", "abc", "-n", "20", "-s", "2", "-q");
    Ran second = RUN(tiny, "-i", "abc", "-n", "20", "-s", "2", "-q");
    Ran r =
        RUN(endless, "-i", "abc", "-n", "20", "-s", "2", "-e", tiny, "-e", in_folder("nothing"));
    CHECK(r.status == 0 && ((r.out.n == first.out.n && !memcmp(r.out.p, first.out.p, r.out.n)) ||
                            (r.out.n == second.out.n && !memcmp(r.out.p, second.out.p, r.out.n))),
          "an ensemble prints one of the models' own answers: %s", r.err.p);
    CHECK(strstr((char *)r.err.p, "does not take part"), "and says which model it cannot load");
    same_text(&r, RUN_AS(((How){.input = "abc"}), endless, "-i", "-", "-n", "20", "-s", "2", "-e",
                         tiny, "-q"), "a prompt from stdin");
    char *longer = get(400, 1);
    memset(longer, 'a', 399);
    Ran alone = RUN(endless, "-i", longer, "-n", "5", "-e", in_folder("llama.bin"));
    CHECK(alone.status == 0 && alone.out.n > 399 &&
              strstr((char *)alone.err.p, "llama.bin does not take part"),
          "a model whose context is too short does not take part: %s", alone.err.p);
    free_ran(&alone), free(longer);
    Model m[2];
    Tokenizer t[2] = {0};
    double mean[2] = {0}, said[2] = {0};
    for (int i = 0; i < 2; i++) {
        load_model(&m[i], i ? tiny : endless);
        find_tokenizer(&t[i], NULL, &m[i]);
    }
    for (int i = 0; i < 2; i++) {
        const Ran *a = i ? &second : &first;
        for (int j = 0; j < 2; j++) {  // the sum of -log2 p over the answer's tokens
            Ids ids = ids_of(&t[j], "abc", 3, NULL, true);
            int from = (int)ids.n;
            encode(&t[j], (Text){(char *)a->out.p + 3, a->out.n - 4}, NULL, false, &ids);
            Cache kv;
            new_cache(&kv, &m[j], (int)ids.n, 0, 0);
            double bits = 0;
            for (int k = 0; k + 1 < (int)ids.n; k++) {
                const float *l = prefill(&m[j], &kv, 0, ids.ids, k, k + 1);
                double sum = 0;
                for (int v = 0; v < m[j].c.vocab_size; v++) sum += exp((double)l[v]);
                if (k + 1 >= from) bits += (log(sum) - (double)l[ids.ids[k + 1]]) / log(2);
            }
            mean[i] += bits / (double)(a->out.n - 4) / 2;
            free_cache(&kv);
            free(ids.ids);
        }
    }
    char *at = (char *)r.err.p;
    for (int i = 0; i < 2; i++) {
        at = strstr(at, "byte, mean ");
        CHECK(at && sscanf(at, "byte, mean %lf", &said[i]) == 1 && fabs(said[i] - mean[i]) < 1e-3,
              "answer %d has %.4f bits per byte on average, not %.4f", i, mean[i], said[i]);
        at += at != NULL;
    }
    const Ran *best = mean[0] <= mean[1] ? &first : &second;
    CHECK(r.out.n == best->out.n, "the answer with the lowest average is printed");
    for (int i = 0; i < 2; i++) free_tokenizer(&t[i]), free_model(&m[i]);
    free_ran(&r), free_ran(&first), free_ran(&second);
}

static void test_combinations(const char *endless) {
    static const char *const wrong[][6] = {{"-b"},
                                           {"-k", "2", "-e", "x"},
                                           {"-k", "2", "-d", "lookup"},
                                           {"-e", "x", "-S", "y"},
                                           {"-e", "x", "-d", "lookup"},
                                           {"-k", "0"},
                                           {"-k", "257"},
                                           {"-y", "x"},
                                           {"-m", "eval", "-k", "2"},
                                           {"-m", "chat", "-k", "2"},
                                           {"-m", "chat", "-e", "x"},
                                           {"-m", "logits", "-d", "lookup"},
                                           {"-m", "bench", "-S", "x"},
                                           {"-m", "check", "-T", "x"},
                                           {"-m", "tokenize", "--think"},
                                           {"-m", "logits", "--receipt"},
                                           {"-m", "eval", "-n", "3"},
                                           {"-m", "compress", "-t", "0"},
                                           {"-f", ""},
                                           {"-T", ""},
                                           {"--session="}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const char *argv[10] = {endless};
        int n = 1;
        for (int j = 0; j < 6 && wrong[i][j]; j++) argv[n++] = wrong[i][j];
        refused(run_program((How){0}, argv), 2, "a combination that means nothing");
    }
}

static void test_decoders(void) {
    if (no_program()) return;
    Buffer b = save_tiny();
    free(b.p);
    save_endless();
    const char *endless = in_folder("endless.bin");
    Vocabulary *v = tiny_vocabulary();
    v->chat.n = 0, v->n_chat = 0;
    for (int i = 0; i < 10; i++) chat_piece(v, "");
    Buffer t = tokenizer_file(v), model = slurp(endless);
    save("plain.bin", model.p, model.n), save("plain.tok", t.p, t.n);
    Shape s = family(LLAMA, ROWS);
    s.vocab = 266, s.layers = 1, s.seq_len = 200;
    Made old = make_weights(&s);
    Buffer bytes = llama2c_file(&old, 0), words = llama2c_tokenizer(story_words, 7);
    save("llama.bin", bytes.p, bytes.n), save("llama.tok", words.p, words.n);
    free(bytes.p), free(words.p), free_made(&old);
    free(t.p), free(model.p), free_vocabulary(v);
    test_display();
    test_full_context();
    test_samples(endless);
    test_speculation(endless);
    test_sessions(endless);
    test_interrupted_session(endless);
    test_full_session(endless);
    test_refused_session(endless);
    test_same_file();
    test_best_in_session(endless);
    test_kills(endless);
    test_tools(endless);
    test_chat(endless);
    test_wordless_chat();
    test_ensemble(endless);
    test_combinations(endless);
}

// =================================================================================================
// 10. Explain
// =================================================================================================

// What forward lets be seen: queries of each layer, and each head's weights, of a batch.
enum { SEEN = 30, SEEN_LAYERS = 3, SEEN_HEADS = 5, SEEN_HEAD = 24 };
typedef struct {
    int heads, residuals;
    float q[SEEN_LAYERS][SEEN][SEEN_HEADS * SEEN_HEAD];
    float weights[SEEN_LAYERS][SEEN * SEEN_HEADS][SEEN];
} Seen;
static void see(void *observer, const char *name, int layer, const float *x, int n, int width) {
    Seen *seen = observer;
    size_t bytes = (size_t)width * sizeof(float);
    if (!strcmp(name, "attention")) memcpy(seen->weights[layer][n], x, bytes);
    if (!strcmp(name, "x")) seen->residuals++;
    for (int i = 0; i < n && !strcmp(name, "q = rope(wq xb)"); i++)
        memcpy(seen->q[layer][i], x + i * padded(width), bytes);
}

// The weights that an observer gets are softmax(q k), by another way; watching changes no bit.
static void test_weights(const Made *made, const Model *m) {
    const Config *c = &m->c;
    int *ids = random_ids(SEEN, c->vocab_size), hd = c->head_dim, at;
    Slot batch[SEEN];
    for (int i = 0; i < SEEN; i++) batch[i] = (Slot){ids[i], i, 0, true};
    Cache kv;
    Seen *seen = get(1, sizeof *seen);
    new_cache(&kv, m, SEEN, 0, 0);
    size_t bytes = (size_t)(SEEN * c->vocab_size) * sizeof(float);
    float *logits = get(bytes, 1);
    memcpy(logits, forward(m, &kv, batch, SEEN), bytes);
    kv.observe = see, kv.observer = seen, kv.plain_attention = true;
    bool same = !memcmp(logits, forward(m, &kv, batch, SEEN), bytes);
    CHECK(same && seen->residuals == c->n_layers + 1, "%s %s: watching changes no bit, and sees "
          "the residual stream %d times", made->s.name, formats[made->s.dtype], seen->residuals);
    double worst = 0, off = 0;
    for (int l = 0; l < c->n_layers; l++)
        for (int i = 0; i < SEEN; i++)
            for (int h = 0; h < c->n_heads; h++) {
                double p[SEEN], sum = 0, all = 0;
                const float *w = seen->weights[l][i * c->n_heads + h];
                double q[SEEN_HEAD];
                for (int d = 0; d < hd; d++) q[d] = (double)seen->q[l][i][h * hd + d];
                if (kv.key_dtype == Q8) round_activations(q, hd, 32, false);
                int first = made->s.window && made->s.local >> l & 1 ? i - made->s.window + 1 : 0;
                for (int t = 0; t <= i; t++) {
                    int kv_head = h / (c->n_heads / c->n_kv_heads);
                    Matrix keys = cache_keys(&kv, cache_chunk(&kv, 0, t, l, kv_head, &at));
                    p[t] = 0;
                    for (int d = 0; d < hd; d++)
                        p[t] += q[d] * (double)weight(&keys, at, d);
                    p[t] = t < first ? 0 : exp(p[t] * (double)c->attn_scale);
                    sum += p[t], all += (double)w[t];
                }
                for (int t = 0; t <= i; t++)
                    worst = worse(worst, fabs(p[t] / sum - (double)w[t]));
                off = worse(off, fabs(all - 1));
            }
    CHECK(off < 1e-5, "%s: the weights of a head add up to 1: off by %g", made->s.name, off);
    CHECK(worst < 1e-5, "%s: they are softmax(q k): off by %g", made->s.name, worst);
    free_cache(&kv);
    free(seen), free(logits), free(ids);
}

// An Explain as explain() makes it, for the functions below it.
typedef struct { Options o; Tokenizer t; Explain e; char *shown; size_t size; } Watched;
static void watch_model(Watched *w, const Model *m, int n, bool trace) {
    Vocabulary *v = tiny_vocabulary();
    size_t layers = (size_t)m->c.n_layers, vocab = (size_t)m->c.vocab_size;
    *w = (Watched){.o = {.trace = trace, .layer = -1, .head = -1, .temperature = 1, .top_p = 0.9,
                         .repeat_penalty = 1, .seed = 5, .quiet = true, .context = n,
                         .threads = 1}};
    w->t = open_tokenizer(v, "watched.tok");
    free_vocabulary(v);
    Output none = {.fd = -1};
    open_machine(&w->e.w, &w->e.d, &w->o, m, &w->t, &none);
    w->e.w.kv.plain_attention = true, w->e.w.kv.observe = watch, w->e.w.kv.observer = &w->e;
    w->e.weights = get((layers * (size_t)m->c.n_heads + 1) * (size_t)n, sizeof(float));
    w->e.logits = get(layers * vocab, sizeof(float));
    w->e.f = open_memstream(&w->shown, &w->size);
    w->e.d.ids = (Ids){random_ids(n, m->c.vocab_size), (size_t)n, (size_t)n};
}
static void free_watched(Watched *w) {
    fclose(w->e.f);
    free(w->shown), free(w->e.weights), free(w->e.logits);
    close_machine(&w->e.w, &w->e.d);
    free_tokenizer(&w->t);
}

static void test_lens(const Made *made, const Model *m) {
    enum { N = 30 };
    Watched w;
    watch_model(&w, m, N, false);
    const Config *c = &m->c;
    size_t bytes = (size_t)c->vocab_size * sizeof(float), last = (size_t)(c->n_layers - 1);
    int unlike = 0, wrong = 0, lost = 0;
    double sums = 0;
    Cache kv;
    new_cache(&kv, m, N, 0, 0);
    for (int n = 1; n <= N; n++) {
        const float *expected = forward(m, &kv, &(Slot){w.e.d.ids.ids[n - 1], n - 1, 0, true}, 1);
        const float *logits = watched_pass(&w.e, n);
        unlike += memcmp(logits, expected, bytes) != 0;
        unlike += memcmp(w.e.logits + last * (size_t)c->vocab_size, expected, bytes) != 0;
        wrong += w.e.lens[last].token != argmax(expected, c->vocab_size);
        double mean = 0, p = 0, max = (double)expected[w.e.lens[last].token];
        for (int i = 0; i < n; i++) mean += (double)weights_of(&w.e, c->n_layers, 0)[i];
        for (int i = 0; i < c->vocab_size; i++) p += exp((double)expected[i] - max);
        sums = worse(sums, fabs(mean - 1));
        lost += fabs(1 / p - (double)w.e.lens[last].p) > 1e-5;
        w.o.layer = n % c->n_layers, w.o.head = n % c->n_heads;
        watched_pass(&w.e, n);
        lost += memcmp(weights_of(&w.e, c->n_layers, 0),
                       weights_of(&w.e, n % c->n_layers, n % c->n_heads), (size_t)n * 4) != 0;
        w.o.layer = w.o.head = -1;
    }
    CHECK(!unlike && !wrong, "%s %s: at the last layer the lens sees the model's logits: %d, %d",
          made->s.name, formats[made->s.dtype], unlike, wrong);
    CHECK(sums < 1e-5 && !lost, "%s: the mean attention adds up to 1 (off by %g); --layer and "
          "--head select one, and the lens gives probabilities: %d", made->s.name, sums, lost);
    free_cache(&kv);
    free_watched(&w);
}

static void test_shown(void) {
    static const struct { const char *text, *shown; int width; } cases[] = {
        {"a", "a", 1}, {"\\", "\\", 1}, {"\n", "\\n", 2}, {"\x1b[", "\\x1b", 4},
        {"\x7f", "\\x7f", 4}, {"\xff", "\\xff", 4}, {"\xe4\xbd", "\\xe4", 4},
        {"\xc2\x9b", "\\x9b", 4}, {"\xc3\xa9", "\xc3\xa9", 1},
        {"\xe4\xbd\xa0", "\xe4\xbd\xa0", 2}, {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80", 2},
        {"\xef\xbf\xbd", "\xef\xbf\xbd", 1}, {"\xe2\x80\xae", "\\u202e", 6},
        {"\xe2\x80\xa8", "\\u2028", 6}, {"\xf3\xa0\x81\x81", "\\ue0041", 7}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text text = {cases[i].text, strlen(cases[i].text)};
        char out[16];
        int width = next_shown(&text, out);
        CHECK(!strcmp(out, cases[i].shown) && width == cases[i].width,
              "%s is shown as %s of %d columns, not %d", out, cases[i].shown, cases[i].width,
              width);
    }
}

static void test_packed_weights(void) {
    int wrong = 0;
    for (int round = 0; round < 1000; round++) {
        float w[300], least = round % 2 ? 0.01f : 0.1f;
        int n = 1 + below(300), rare = 1 + below(200);
        char *packed;
        size_t size;
        for (int i = 0; i < n; i++)
            w[i] = below(rare) ? 0 : (float)(uniform() * (round % 3 ? 0.2 : 1));
        if (round < 3) w[n - 1] = 1;
        FILE *f = open_memstream(&packed, &size);
        put_weights(f, w, n, least);
        fclose(f);
        const char *digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        int at = 0;
        double got[300] = {0};
        wrong += strspn(packed, digits) != size;
        for (size_t k = 0; k < size; k += 2) {
            at += (int)(strchr(digits, packed[k]) - digits);
            int code = (int)(strchr(digits, packed[k + 1]) - digits);
            if (code && at < n) got[at++] = code;
        }
        for (int i = 0; i < n; i++)
            wrong += w[i] < least ? got[i] != 0 : fabs(sqrt((double)w[i]) * 63 - got[i]) > 0.501;
        free(packed);
    }
    CHECK(!wrong, "packed weights are those of at least 1%% or 10%%, to a 63rd: %d differ", wrong);
}

// The text of one forward, token to token: the same bytes from every build.
static void test_trace(void) {
    uint64_t hash = 0;
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = F32; dtype <= Q4A; dtype++) {
            random_state = (uint64_t)(2000 + which * 10 + dtype);
            Made made = tiny_model(which, dtype);
            Model m = open_made(&made, "trace.bin");
            Watched w;
            watch_model(&w, &m, 12, true);
            for (int n = 1; n <= 12; n++) {
                const float *logits = watched_pass(&w.e, n);
                rank_tokens(&w.e, sample(&w.e.d.s, logits, w.e.d.ids.ids, n));
                show_choice(&w.e);
            }
            fflush(w.e.f);
            if (which == 0 && dtype == F32) {
                char line[99];
                const float *x = w.e.w.kv.state->xb;
                double sum = 0;
                for (int i = 0; i < m.c.dim; i++) sum += (double)x[i] * (double)x[i];
                snprintf(line, sizeof line, "\n%-29s %7d %10.4g  %9.3g %9.3g %9.3g\n",
                         "xb = final_norm(x)", 64, sqrt(sum), (double)x[0], (double)x[1],
                         (double)x[2]);
                const char *last = w.shown, *next;
                while ((next = strstr(last + 1, "xb = final_norm")) != NULL) last = next;
                CHECK(!strncmp(last - 1, line, strlen(line)), "a trace shows name, width, norm and "
                      "first values: %.90s, not %s", last, line + 1);
            }
            hash = mix64(hash + hash64(w.shown, w.size));
            free_watched(&w);
            free_model(&m);
            free_made(&made);
        }
    CHECK(hash == 0x7fd4739cb67552f5, "the traces have hash 0x%016llx in %s",
          (unsigned long long)hash, isa);
}

static int count(const Buffer *b, const char *what) {
    int n = 0;
    for (const char *p = (char *)b->p; (p = strstr(p, what)) != NULL; p++) n++;
    return n;
}

// Runs explain with a page, and joins the texts that its JSON holds, of the prompt's tokens and of
// those generated; bytes: the decoded text of all.
static Buffer page_of(const char *prompt, const char *options[4], const char *path, Buffer *texts,
                      Buffer *bytes) {
    Tokenizer t;
    Model m;
    load_model(&m, in_folder("tiny.bin"));
    const char *why = load_tokenizer(&t, in_folder("tiny.tok"), &m);
    CHECK(!why, "its tokenizer opens: it %s", why);
    Options o = {.prompt = prompt, .output = path, .steps = atoi(options[0]), .quiet = true,
                 .temperature = atof(options[1]), .top_p = atof(options[2]), .seed = 7,
                 .repeat_penalty = 1, .top_k = atoi(options[3]), .layer = -1, .head = -1,
                 .threads = 1};
    Output out = open_output(path);
    explain(&o, &m, &t, &out);
    close_output(&out);
    Buffer page = slurp(path);
    int previous = -1, id;
    for (char *p = (char *)page.p; (p = strstr(p, "{\"t\":\"")) != NULL;) {
        char *end = strstr(p, "\",\"id\":");
        if (!end) break;
        put(&texts[!strstr(end, "\"given\":1") || strstr(end, "\"given\":1") > end + 22], p + 6,
            (size_t)(end - p - 6));
        id = atoi(end + 7);
        Text text = decode(&t, previous, id);
        if (previous >= 0 || id != t.h.bos) put(bytes, text.s, text.len);
        previous = id, p = end;
    }
    put(&texts[0], NULL, 1), put(&texts[1], NULL, 1), put(bytes, NULL, 1);
    free_tokenizer(&t), free_model(&m);
    return page;
}

static void test_page(void) {
    const char *hostile = "</script><img src=x onerror=alert(1)> \"\\ &lt; \xe2\x80\xa8\x01\xff\n";
    const char *escaped = "\\u003c/script>\\u003cimg src=x onerror=alert(1)> \\\"\\\\ &lt; "
                          "\\\\xe2\\\\x80\\\\xa8\\\\x01\\\\xff\\\\n";
    char *json;
    size_t size;
    FILE *f = open_memstream(&json, &size);
    put_json(f, (Text){hostile, strlen(hostile)});
    fclose(f);
    CHECK(!strcmp(json, "\"\\u003c/script>\\u003cimg src=x onerror=alert(1)> \\\"\\\\ &lt; "
                        "\\\\u2028\\\\x01\\\\xff\\\\n\""),
          "a text is escaped as a string of JSON in HTML: %s", json);
    free(json);
    const char *options[][4] = {
        {"40", "1", "0.9", "0"}, {"40", "0", "0.9", "0"}, {"40", "1.5", "1", "3"},
        {"40", "1", "1", "0"}};
    for (int i = 0; i < 4; i++) {
        Buffer texts[2] = {{0}, {0}}, bytes = {0};
        const char *prompt = i == 3 ? "abc bad cab" : hostile, *path = in_folder("page.html");
        Buffer page = page_of(prompt, options[i], path, texts, &bytes);
        CHECK(page.n < 300000 && !memcmp(page.p, "<!doctype html>", 15) &&
                  count(&page, "\n</script>\n") == 1 && count(&page, "</html>") == 0,
              "a page of 60 tokens has %zu bytes", page.n);
        if (i < 3)
            CHECK(!strcmp((char *)texts[0].p, escaped), "the prompt is in it, escaped: %s",
                  texts[0].p);
        CHECK(count(&page, "<script") == 2 && count(&page, "</script") == 2 &&
                  count(&page, "http") == 1 && count(&page, "url(") == 0,
              "and nothing in it is an element, or an address elsewhere");
        if (no_program()) return;
        Ran r = RUN(in_folder("tiny.bin"), "-i", prompt, "-n", options[i][0], "-t", options[i][1],
                    "-p", options[i][2], "--top-k", options[i][3], "-s", "7", "-q");
        r.out.p[r.out.n - 1] = 0;
        CHECK(!strcmp((char *)r.out.p, (char *)bytes.p) && bytes.n > strlen(prompt) + 8,
              "it holds the text that generate writes with the same options: \"%s\", not \"%s\"",
              bytes.p, r.out.p);
        free_ran(&r);
        // The terminal's titles name the same tokens: a page computes them one by one, it does not.
        r = RUN(in_folder("tiny.bin"), "-m", "explain", "-i", prompt, "-n", options[i][0], "-t",
                options[i][1], "-p", options[i][2], "--top-k", options[i][3], "-s", "7", "-q");
        Buffer titles = {0};
        for (char *p = (char *)r.out.p, *end; (p = strstr(p, "\n== position ")) != NULL; p = end) {
            p = strchr(p, '"') + 1, end = strstr(p, "\" =");
            for (; p < end; p++) {
                if (*p == '"' || *p == '\\') put(&titles, "\\", 1);
                put(&titles, *p == '<' ? "\\u003c" : p, *p == '<' ? 6 : 1);
            }
        }
        put(&titles, NULL, 1);
        CHECK(titles.n >= texts[1].n && !memcmp(titles.p, texts[1].p, texts[1].n - 1),
              "the terminal shows the page's tokens: %s, not %s", titles.p, texts[1].p);
        free_ran(&r);
        free(page.p), free(texts[0].p), free(texts[1].p), free(bytes.p), free(titles.p);
    }
}

// Lines of at most 79 columns of UTF-8 without control characters.
static bool fits_a_terminal(const Buffer *b) {
    int columns = 0;
    size_t used;
    for (size_t i = 0; i < b->n; i += used, columns++) {
        uint32_t c = next_char((char *)b->p + i, b->n - i, &used);
        if (c == '\n') columns = -1;
        else if (c < 32 || (c > 126 && c < 160) || (c == 0xfffd && used == 1)) return false;
        if (c >= 0x1100 && c < 0x20000 && c != 0xfffd) columns++;  // these are wide here
        if (columns >= 79) return false;
    }
    return true;
}

static void test_terminal(void) {
    static const char *const prompts[] = {
        "abc bad cab", "\x1b[31m\x07\x7f\xc2\x9b \xff\xe4\xbd \xe2\x80\xae\n\n\t.",
        "\xe4\xbd\xa0\xe5\xa5\xbd \xed\x95\x9c\xf0\x9f\x98\x80 e\xcc\x81 \xef\xbf\xbd \xc3\xa9",
        "                                                                                  a "};
    char *longer = get(600, 1);
    for (int i = 0; i < 590; i++) longer[i] = i % 7 ? 'e' : ' ';
    const char *model = in_folder("tiny.bin");
    for (int i = 0; i < 5; i++) {
        const char *prompt = i < 4 ? prompts[i] : longer;
        Ran r = RUN(model, "-m", "explain", "-i", prompt, "-n", "12", "-s", "3");
        CHECK(r.status == 0 && count(&r.out, "== position") == 12 && fits_a_terminal(&r.out),
              "the terminal's view of prompt %d is of lines that fit: status %d, %.300s", i,
              r.status, r.out.p);
        if (i == 0)
            CHECK(count(&r.out, "\n> the number") == 12 && count(&r.out, "\nlens: 0 \"") == 12 &&
                      count(&r.out, "\nabc bad cab") == 12,
                  "it shows text, choice and lens: %.300s", r.out.p);
        free_ran(&r);
        r = RUN(model, "-m", "explain", "-i", prompt, "-n", "1", "--trace", "-s", "3");
        CHECK(r.status == 0 && fits_a_terminal(&r.out) && count(&r.out, "xb = final_norm") == 1,
              "and so is the trace: status %d, %.300s", r.status, r.out.p);
        if (i == 0) {
            const char *path = in_folder("trace.txt");
            Ran other = RUN(model, "-m", "explain", "-i", prompt, "-n", "1", "--trace", "-s", "3",
                            "-j", "3", "-o", path);
            Buffer file = slurp(path);
            CHECK(other.out.n == 0 && file.n == r.out.n && !memcmp(file.p, r.out.p, file.n),
                  "-o takes the trace, which is the same on three threads: %s", other.err.p);
            free_ran(&other), free(file.p);
        }
        free_ran(&r);
    }
    free(longer);
    // Colours change nothing but the marks.
    Made made = tiny_model(GEMMA, Q8);
    Model m = open_made(&made, "watched.bin");
    Watched w;
    watch_model(&w, &m, 20, false);
    Buffer stripped = {0}, lines = {0};
    for (int color = 0; color < 2; color++) {
        w.e.color = color;
        for (int n = 1; n < 20; n++) {
            watched_pass(&w.e, n);
            memcpy(w.e.d.s.p, w.e.logits, (size_t)m.c.vocab_size * sizeof(float));
            softmax(w.e.d.s.p, 0, m.c.vocab_size);
            rank_tokens(&w.e, w.e.d.ids.ids[n]);
            show_token(&w.e);
        }
        fflush(w.e.f);
        bool coloured = strstr(w.shown, "\033[48;5;") != NULL;
        CHECK(coloured == color, "there are colours where there are to be");
        for (char *p = w.shown, *end; p < w.shown + w.size; p = end + 1) {
            end = strchr(p, '\n');
            if (!color && p[strspn(p, " 12345678")] == '\n' && end > p) continue;
            for (; p <= end; p++) {
                if (*p == '\033') p = strchr(p, 'm');
                else put(color ? &stripped : &lines, p, 1);
            }
        }
        rewind(w.e.f);
    }
    bool same = stripped.n == lines.n && !memcmp(stripped.p, lines.p, lines.n);
    put(&lines, "", 1);  // a string from here on
    CHECK(same && count(&lines, "== position") > 0,
          "colours stand for the marks below");
    free(stripped.p), free(lines.p);
    free_watched(&w), free_model(&m), free_made(&made);
}

static void test_explain_options(void) {
    const char *model = in_folder("tiny.bin"), *page = in_folder("page.html");
    refused(RUN(model, "-i", "a", "--trace"), 2, "a trace of generate");
    refused(RUN(model, "-m", "eval", "-i", "a", "--layer", "0"), 2, "a layer of eval");
    refused(RUN(model, "-m", "explain", "-i", "a", "--head", "0"), 2, "a head without its layer");
    refused(RUN(model, "-m", "explain", "-i", "a", "--layer", "-1"), 2, "layer -1");
    refused(RUN(model, "-m", "explain", "-i", "a", "--layer", "x"), 2, "layer x");
    refused(RUN(model, "-m", "explain", "-i", "a", "--layer", "1"), 1, "a layer beyond the last");
    refused(RUN(model, "-m", "explain", "-i", "a", "--layer", "0", "--head", "4"), 1,
            "a head beyond the last");
    refused(RUN(model, "-m", "explain", "-i", "a", "--layer", "0", "-o", page), 2,
            "a layer of a page, which shows all");
    refused(RUN(model, "-m", "explain", "-i", "a", "-o", in_folder("no/such/folder"), "-q"),
            1, "a page in a missing folder");
    refused(RUN(model, "-m", "explain", "-i", "a", "-o", model), 2, "a page over the model");
    How closed = {.closed_pipe = true};
    Ran r = RUN_AS(closed, model, "-m", "explain", "-i", "abc", "-n", "50", "-s", "1");
    CHECK(r.status == 0 && r.signal == 0, "a closed pipe ends it quietly: %d, %d", r.status,
          r.signal);
    free_ran(&r);
    static const char *const choices[][2] = {{"0", "0"}, {"0", "3"}};
    for (int i = 0; i < 2; i++) {
        r = RUN(model, "-m", "explain", "-i", "abc", "-n", "3", "-s", "1", "--layer", choices[i][0],
                "--head", choices[i][1]);
        CHECK(r.status == 0 && count(&r.out, "== position") == 3, "head %s: %s", choices[i][1],
              r.err.p);
        free_ran(&r);
    }
    r = RUN(model, "-m", "explain", "-n", "2", "-t", "0");
    CHECK(r.status == 0 && count(&r.out, "the likeliest") == 2, "no prompt, no temperature: %s%s",
          r.out.p, r.err.p);
    free_ran(&r);
}

static void test_explain(void) {
    for (int which = 0; which < N_FAMILIES; which++)
        for (int dtype = ROWS; dtype <= Q4A; dtype++) {
            if (dtype == ROWS && which != LLAMA) continue;
            Made made = tiny_model(which, dtype);
            Model m = open_made(&made, "explain.bin");
            set_threads(dtype % 2 ? 3 : 1);
            test_weights(&made, &m);
            test_lens(&made, &m);
            free_model(&m);
            free_made(&made);
        }
    set_threads(1);
    test_packed_weights();
    test_shown();
    free(save_tiny().p);
    test_page();
    if (no_program()) return;
    test_terminal();
    test_explain_options();
}

// =================================================================================================
// 11. Compression
// =================================================================================================

static Buffer squeeze_with(const Model *m, const Tokenizer *t, const Buffer *text, size_t block,
                           bool plain) {
    Options o = {.prompt_file = save("text", text->p, text->n)};
    Codec z;
    open_codec(&z, m, t, true);
    static const int contexts[] = {256, 200, SHORTEST_CONTEXT};  // 64, 50 and 4 shared positions
    set_context(&z, contexts[text->n % 3]);
    z.block = block;
    z.kv.plain = plain;
    z.shortest = 150;
    Input in = open_input(&o);
    Output out = open_output(in_folder("squeezed"));
    uint64_t size = shrink(&z, &in, &out);
    close_output(&out), close_input(&in), free_codec(&z);
    Buffer b = slurp(in_folder("squeezed"));
    CHECK(b.n == size, "compression counts its %zu bytes: %zu", b.n, (size_t)size);
    return b;
}
static Buffer squeeze(const Model *m, const Tokenizer *t, const Buffer *text) {
    return squeeze_with(m, t, text, BLOCK, false);
}
// Returns what is wrong; *text gets what was written up to then.
static const char *unsqueeze(const Model *m, const Tokenizer *t, const Buffer *b, size_t n,
                             Buffer *text) {
    Options o = {.prompt_file = save("squeezed", b->p, n)};
    Codec z;
    open_codec(&z, m, t, true);
    Input in = open_input(&o);
    unlink(in_folder("unsqueezed"));
    Output out = open_output(in_folder("unsqueezed"));
    const char *wrong = expand(&z, &in, &out);
    close_output(&out), close_input(&in), free_codec(&z);
    *text = slurp(in_folder("unsqueezed"));
    return wrong;
}
static bool equal(const Buffer *a, const Buffer *b) {
    return a->n == b->n && (!a->n || !memcmp(a->p, b->p, a->n));
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

// Input number i of the adversarial ones, or false.
static bool odd_input(int i, Buffer *b) {
    int n_texts = (int)(sizeof odd_texts / sizeof *odd_texts);
    static const char letters[] = "abc d\n";
    *b = (Buffer){0};
    put(b, NULL, 1);
    b->n = 0;
    if (i < 256) return put(b, &(char){(char)i}, 1), true;
    if ((i -= 256) < n_texts) return put(b, odd_texts[i], strlen(odd_texts[i])), true;
    i -= n_texts;
    int n = i == 0 ? 0 : i < 20 ? i * i * 5 : 3000;
    for (int j = 0; j < n && i < 24; j++) {
        uint32_t c = (uint32_t)(i % 4 == 1 ? below(256) : i % 4 == 3 ? 32 + below(95) : 0);
        if (i % 4 == 0) c = (uint8_t)letters[below(6)];
        if (i % 4 == 2) c = (uint8_t)(below(30) ? letters[below(6)] : below(256));
        put(b, &(char){(char)c}, 1);
    }
    if (i == 24) for (int j = 0; j < 1024; j++) put(b, &(char){(char)j}, 1);
    if (i == 25) for (int j = 0; j < 4000; j++) put(b, &"\xe2\x82\xac" "a\xc3\xa9"[below(6)], 1);
    if (i == 26 || i == 27) {  // 64 KiB of one byte
        put(b, NULL, 65536);
        memset(b->p, i == 26 ? 'a' : 0, b->n);
    }
    return i < 28;
}

// Each input comes back, and noise grows by at most 2%, a header and learning that it is noise.
static void test_round_trips(const Model *m, const Tokenizer *t, const char *name) {
    Buffer b, back;
    for (int i = 0; odd_input(i, &b); i++) {
        Buffer small = squeeze(m, t, &b);
        const char *wrong = unsqueeze(m, t, &small, small.n, &back);
        CHECK(!wrong && equal(&b, &back), "%s: input %d of %zu bytes comes back: %zu bytes, %s",
              name, i, b.n, back.n, wrong ? wrong : "no error");
        CHECK(small.n < b.n + b.n / 50 + 160, "%s: input %d of %zu bytes grows to %zu", name, i,
              b.n, small.n);
        if (b.n == 65536) CHECK(small.n < 1000, "%s: 64 KiB of one byte: %zu", name, small.n);
        free(b.p), free(back.p), free(small.p);
    }
    free(b.p);
}

// A text of several blocks and segments: the same file however it is computed.
static void test_one_file(const Model *m, const Tokenizer *t) {
    Buffer b = {0}, back;
    while (b.n < 9000) {
        const char *from = &"a bad cab, dad\n"[below(12)];
        put(&b, from, 1 + (size_t)below(3));
    }
    put(&b, "\xff\xff", 2);
    Buffer small = squeeze_with(m, t, &b, 4096, false);
    for (int threads = 1; threads < 4; threads += 2) {
        set_threads(threads);
        for (int plain = 0; plain < 2; plain++) {
            Buffer again = squeeze_with(m, t, &b, 4096, plain);
            CHECK(equal(&small, &again), "%d threads, plain %d: the same file", threads, plain);
            free(again.p);
        }
        const char *wrong = unsqueeze(m, t, &small, small.n, &back);
        CHECK(!wrong && equal(&b, &back), "blocks of 4096 come back: %s", wrong ? wrong : "other");
        free(back.p);
    }
    Buffer whole = squeeze(m, t, &b);
    CHECK(whole.n < small.n && small.n < b.n * 3 / 5, "9000 bytes: %zu in one block, %zu in three",
          whole.n, small.n);
    // Blocks in another order, or one of them left out, are found.
    for (size_t cut = 24 + 60; cut < small.n; cut += small.n / 7) {
        Buffer moved = {0};
        put(&moved, small.p, cut);
        put(&moved, small.p + cut + 1, small.n - cut - 1);
        CHECK(unsqueeze(m, t, &moved, moved.n, &back), "a byte less at %zu is found", cut);
        free(moved.p), free(back.p);
    }
    free(b.p), free(small.p), free(whole.p);
}

// What the model has learned is of no use for noise, which is then coded as it is.
static void test_noise_after_text(const Model *m, const Tokenizer *t) {
    Buffer b = {0}, back;
    while (b.n < 2048) put(&b, "a bad cab, dad\n", 16);
    while (b.n < 2560) put(&b, &(char){(char)(33 + below(94))}, 1);
    while (b.n < 3584) put(&b, "a bad cab, dad\n", 16);
    Buffer small = squeeze_with(m, t, &b, 128, false);
    const char *wrong = unsqueeze(m, t, &small, small.n, &back);
    CHECK(!wrong && equal(&b, &back), "noise between texts comes back: %s",
          wrong ? wrong : "other");
    free(b.p), free(back.p), free(small.p);
}

static void test_flipped_bits(const Model *m, const Tokenizer *t) {
    Buffer b = {0}, back;
    put(&b, "a bad cab: dada bab\xff\n", 21);
    Buffer small = squeeze(m, t, &b);
    for (size_t i = 0; i < small.n * 8; i++) {
        small.p[i / 8] ^= (uint8_t)(1 << i % 8);
        const char *wrong = unsqueeze(m, t, &small, small.n, &back);
        CHECK(wrong && !back.n, "bit %zu of byte %zu, changed, is found before anything is written",
              i % 8, i / 8);
        small.p[i / 8] ^= (uint8_t)(1 << i % 8);
        free(back.p);
    }
    for (size_t n = 0; n < small.n; n++) {
        const char *wrong = unsqueeze(m, t, &small, n, &back);
        CHECK(wrong && !back.n, "a file cut to %zu of %zu bytes is found", n, small.n);
        free(back.p);
    }
    put(&small, "", 1);
    CHECK(unsqueeze(m, t, &small, small.n, &back), "a byte too many is found");
    free(back.p), free(b.p), free(small.p);
}

// A byte-level tokenizer, two of SentencePiece (with and without byte tokens), one of llama2.c.
static Tokenizer compression_tokenizer(int which, Vocabulary *v) {
    if (which == 0) {
        Vocabulary *tiny = tiny_vocabulary();
        Tokenizer t = open_tokenizer(tiny, "squeeze.tok");
        *v = (Vocabulary){.n = tiny->n};
        free_vocabulary(tiny);
        return t;
    }
    if (which == 3) {
        Buffer b = llama2c_tokenizer(story_words, 7);
        Model m = {.c = {.vocab_size = 266}};
        Tokenizer t;
        const char *wrong = load_tokenizer(&t, save("squeeze.tok", b.p, b.n), &m);
        CHECK(!wrong, "a tokenizer of llama2.c opens: it %s", wrong);
        free(b.p);
        *v = (Vocabulary){.n = 266};
        return t;
    }
    Vocabulary *s = new_vocabulary(SENTENCEPIECE);
    s->flags = ADD_BOS | ADD_SPACE_PREFIX;
    s->unk = token(s, "<unk>", 5, 0, CONTROL);
    s->bos = token(s, "<s>", 3, 0, CONTROL);
    if (which == 1) all_bytes(s);
    for (int i = 0; i < 6; i++) token(s, &" abcd\n"[i], 1, -1000, NORMAL);
    token(s, "\xc3\xa9", 2, -1000, NORMAL);
    random_merges(s, " abcd", 30);
    token(s, "\n\n", 2, 0, USER_DEFINED);
    Tokenizer t = open_tokenizer(s, "squeeze.tok");
    *v = (Vocabulary){.n = s->n};
    free_vocabulary(s);
    return t;
}
static const char *const compression_tokenizers[] = {
    "byte-level", "SentencePiece", "SentencePiece without bytes", "llama2.c"};
static Made compression_model(int which, int vocab) {
    static const int families[] = {LLAMA, GEMMA, QWEN2, LLAMA}, dtypes[] = {Q8, F32, Q4A, ROWS};
    Shape s = family(families[which], dtypes[which]);
    s.vocab = vocab, s.layers = 2, s.seq_len = 1000;
    return make_weights(&s);
}

static void test_compression_files(void) {
    if (no_program()) return;
    Buffer tiny = save_tiny();
    const char *model = in_folder("tiny.bin"), *text = save("in", "a bad cab\n", 10);
    const char *small = in_folder("small"), *out = in_folder("out");
    prints(RUN(model, "-m", "compress", "-f", text, "-o", small, "-q"), "", "compress to a file");
    prints(RUN(model, "-m", "decompress", "-f", small, "-q"), "a bad cab\n", "decompress it");
    prints(RUN(model, "-m", "decompress", "-f", small, "-o", out, "-q"), "", "... to a file");
    Buffer b = slurp(out), z = slurp(small);
    CHECK(b.n == 10 && !memcmp(b.p, "a bad cab\n", 10), "the file has the text");
    CHECK(z.n < 68, "10 bytes become %zu", z.n);
    unlink(out);
    int before = files_in_folder();
    z.p[z.n / 2] ^= 1;
    const char *bad = saved("bad", &z, z.n);
    refused(RUN(model, "-m", "decompress", "-f", bad, "-o", out), 1, "a damaged file");
    CHECK(files_in_folder() == before + 1 && access(out, F_OK), "nothing of it is left behind");
    refused(RUN(model, "-m", "decompress", "-f", text), 1, "a file that is not compressed");
    z.p[3] = '2';
    Ran old = RUN(model, "-m", "decompress", "-f", saved("bad", &z, z.n));
    CHECK(old.status == 1 && strstr((char *)old.err.p, "another version"), "an older file");
    free_ran(&old);
    Ran r = RUN_AS(((How){.input = "dad"}), model, "-m", "compress", "-q");
    Ran arg = RUN(model, "-m", "compress", "-i", "dad", "-q");
    CHECK(r.status == 0 && equal(&r.out, &arg.out), "stdin, or the text of -i: the same file");
    free_ran(&r), free_ran(&arg);
    refused(RUN(model, "-m", "compress", "-f", text, "-o", text), 2, "an output that is the input");
    save_endless();
    refused(RUN(in_folder("endless.bin"), "-m", "decompress", "-f", small), 1, "another model");
    free(b.p), free(z.p), free(tiny.p);
}

// Segments begin after an empty line, or else with a line, if one of these is near enough; the
// decoder learns where.
static void test_segment_starts(const Model *m, const Tokenizer *t, const char *name) {
    enum { CUTS = 200, MOST = 7 };
    Codec z;
    open_codec(&z, m, t, true);
    Block b = {.raw = resize(NULL, 3000, 1), .n_bytes = 3000};
    b.pieces = resize(NULL, b.n_bytes, sizeof(Piece));
    for (size_t i = 0; i < b.n_bytes; i++) b.raw[i] = (uint8_t)"abcd \nab\nd\n\n"[below(12)];
    for (size_t i = 0; i < b.n_bytes; i++) if (!below(4)) b.raw[i] = 'a';
    cut_block(t, &b);
    int cuts[CUTS], nearest = 0, lines = 0;
    start_coder(&z.coder, false, 0);
    for (int i = 0; i < CUTS; i++) cuts[i] = code_cut(&z, &b, 20 + i, i % (MOST + 1));
    finish_coder(&z.coder);
    size_t size = z.coder.n;
    start_coder(&z.coder, true, size);
    for (int i = 0; i < CUTS; i++) {
        int best = 0, cut = 0;
        for (int j = 0; j <= i % (MOST + 1); j++) {
            const uint8_t *at = b.raw + b.pieces[20 + i - j].start;
            int rank = at[-1] != '\n' ? 0 : at[-2] != '\n' ? 1 : 2;
            if (rank > best) best = rank, cut = j;
        }
        lines += best > 0;
        nearest += cut == cuts[i];
        CHECK(code_cut(&z, &b, 20 + i, i % (MOST + 1)) == cuts[i], "%s: cut %d of %d comes back",
              name, i, CUTS);
    }
    CHECK(nearest == CUTS && lines > CUTS / 3 && lines < CUTS,
          "%s: %d of %d cuts are the nearest, %d at lines", name, nearest, CUTS, lines);
    free(b.raw), free(b.pieces);
    free_codec(&z);
}

// The place in the line is known across segments and blocks: that of the last piece of a block, of
// which the second holds no line's end.
static void test_columns(const Model *m, const Tokenizer *t, const char *name) {
    enum { N = 1500 };
    Codec z;
    open_codec(&z, m, t, true);
    set_context(&z, 256);
    char *text = get(2 * N, 1);
    for (int i = 0; i < N; i++) text[i] = "abcd \nab\nd\n\n"[below(12)];
    memset(text + N - 9, 'b', 9);
    for (int i = N; i < N + 50; i++) text[i] = "abcd "[below(5)];
    for (int i = 0, n = N; i < 2; i++, n = 50) {
        Block b = {.raw = (uint8_t *)text + i * N, .n_bytes = (size_t)n, .segments = i ? 1 : 4};
        b.pieces = resize(NULL, b.n_bytes, sizeof(Piece));
        cut_block(t, &b);
        start_coder(&z.coder, false, 0);
        code_block(&z, &b);
        int at = i * N + (int)b.pieces[b.n - 1].start, line = at;
        while (text[line - 1] != '\n') line--;
        CHECK(z.column[0] == at - line, "%s: block %d ends at place %d of its line, not %d", name,
              i, at - line, z.column[0]);
        free(b.pieces);
    }
    free(text);
    free_codec(&z);
}

static void test_compression(void) {
    for (int which = 0; which < 4; which++) {
        Vocabulary v;
        Tokenizer t = compression_tokenizer(which, &v);
        Made made = compression_model(which, v.n);
        Model m = open_made(&made, "squeeze.bin");
        test_round_trips(&m, &t, compression_tokenizers[which]);
        if (which < 2) test_one_file(&m, &t);
        test_noise_after_text(&m, &t);
        test_segment_starts(&m, &t, compression_tokenizers[which]);
        test_columns(&m, &t, compression_tokenizers[which]);
        if (!which) test_flipped_bits(&m, &t);
        free_tokenizer(&t), free_model(&m), free_made(&made);
    }
    test_compression_files();
}

// The bytes of a compressed file, which every build must write, and read.
static void test_one_compressed_file(void) {
    static const uint64_t expected[] = {0x41478824f8118aaf, 0xb70ef10442f4ce3b,
                                        0xf7ca5d00f18dfa7e, 0x5cd3f9b386ab59e4};
    for (int which = 0; which < 4; which++) {
        random_state = (uint64_t)(5000 + which);
        Vocabulary v;
        Tokenizer t = compression_tokenizer(which, &v);
        Made made = compression_model(which, v.n);
        Model m = open_made(&made, "squeeze.bin");
        Buffer b = {0}, back;
        while (b.n < 2500) {
            const char *from = &"a bad cab, dad\n\xc3\xa9"[below(16)];
            put(&b, from, 1 + (size_t)below(2));
        }
        Buffer small = squeeze(&m, &t, &b);
        unsigned long long hash = hash64(small.p, small.n);
        CHECK(hash == expected[which], "%s: 2500 bytes become %zu of hash 0x%016llx in %s",
              compression_tokenizers[which], small.n, hash, isa);
        CHECK(!unsqueeze(&m, &t, &small, small.n, &back) && equal(&b, &back), "%s: they come back",
              compression_tokenizers[which]);
        free(b.p), free(back.p), free(small.p);
        free_tokenizer(&t), free_model(&m), free_made(&made);
    }
}

static void test_same_everywhere(void) {
    test_one_hash();
    test_trace();
    test_one_compressed_file();
}

// =================================================================================================
// 12. Faults: every function that can fail is made to, once (`make test-faults`)
// =================================================================================================

// Runs the program with the nth call of a function failing, or with two signals just before it.
// True if it failed.
static bool inject(const char *const *argv, const char *function, int n, bool signals) {
    const char *out = in_folder("result"), *session = in_folder("session"),
               *saved = in_folder("saved");
    char value[40], input[400];
    snprintf(value, sizeof value, "%s:%d", function, n);
    snprintf(input, sizeof input, "abc\n/save %.300s\nd\n", saved);
    unlink(out), unlink(session), unlink(saved);
    save("stdin", input, strlen(input));  // so that it is counted
    int files = files_in_folder();
    setenv("FAULT", value, 1);
    if (signals) setenv("FAULT_SIGNALS", "1", 1);
    Ran r = run_program((How){.input = input}, argv);
    unsetenv("FAULT"), unsetenv("FAULT_SIGNALS");
    bool failed_ = r.status == 1;
    if (signals)
        CHECK(r.signal == SIGINT || r.signal == SIGTERM ||
                  (r.signal == 0 && (r.status == 0 || (r.status >= 129 && r.status <= 143))),
              "%s with signals before %s: status %d, signal %d, %s", r.command, value, r.status,
              r.signal, r.err.p);
    else
        CHECK(r.signal == 0 && (r.status == 0 || (failed_ && strstr((char *)r.err.p, "run: "))),
              "%s with %s: status %d, signal %d, %s", r.command, value, r.status, r.signal,
              r.err.p);
    struct stat st;
    if (failed_ && stat(session, &st))
        CHECK(access(out, F_OK), "%s with %s leaves no half-written file", r.command, value);
    if (failed_ && strcmp(function, "fstat") && !stat(session, &st))
        CHECK(st.st_size > PAGE, "%s with %s leaves no session without text", r.command, value);
    unlink(out), unlink(session), unlink(saved);
    int left = files_in_folder() - files;
    CHECK(!left, "nor %d others: %s with %s%s", left, r.command, signals ? "signals before " : "",
          value);
    free_ran(&r);
    return failed_;
}

static void test_faults(void) {
    static const char *const names[] = {
        "mkstemp", "fcntl", "write", "fsync", "rename", "realloc", "malloc", "posix_memalign",
        "mmap", "open", "fstat", "read", "pread", "pwrite", "msync", "ftruncate",
        "posix_fallocate", "fork", "pipe", "pthread_create", "getline", "open_memstream"};
    enum { AROUND_FILES = 6 };  // the first ones: signals come before them, too
    if (!getenv("FAULTS")) {
        skip(1, "faults: `make test-faults` runs them");
        return;
    }
    free(save_tiny().p);
    save_endless();
    const char *endless = in_folder("endless.bin"), *out = in_folder("result");
    const char *text = save("prompt", "abc d abc d cab 12", 18);
    Ran r = RUN(endless, "-m", "compress", "-f", text, "-o", in_folder("small"), "-q");
    free_ran(&r);
    const char *const commands[][16] = {
        {"-i", "abc", "-n", "5", "-j", "3"},
        {"-i", "abc", "-n", "5", "-o", out},
        {"-i", "abc", "-n", "5", "-k", "3"},
        {"-i", "abc", "-n", "5", "-S", in_folder("session")},
        {"-i", "1+1=", "-n", "3", "-T", "cat"},
        {"-i", "abc", "-n", "5", "-d", "lookup"},
        {"-m", "chat", "-n", "3", "-c", "99", "-o", out},
        {"-m", "eval", "-f", text, "-o", out},
        {"-m", "compress", "-f", text, "-o", out},
        {"-m", "decompress", "-f", in_folder("small"), "-o", out},
        {"-m", "explain", "-i", "abc", "-n", "2", "-c", "99", "-o", out},
        {"-m", "tokenize", "-f", text},
        {"-m", "logits", "-i", "1 2 3"},
        {"-i", "abc", "-e", endless}};
    int injected = 0;
    for (size_t c = 0; c < sizeof commands / sizeof *commands; c++) {
        const char *argv[20] = {endless, "-s", "1", "-q"};
        for (int i = 0; commands[c][i]; i++) argv[4 + i] = commands[c][i];
        for (size_t f = 0; f < sizeof names / sizeof *names; f++)
            for (int n = 1; n <= 40; n = n < 8 ? n + 1 : n * 2) {
                injected += inject(argv, names[f], n, false);
                if (f < AROUND_FILES) inject(argv, names[f], n, true);
            }
    }
    printf("  %d failures injected\n", injected);
}

// =================================================================================================
// 13. Signals at random moments, in every mode (ROUNDS=500 for more of them)
// =================================================================================================

// One signal ends a program that waits for its input, whether it comes before it waits or then.
static void test_signals_while_waiting(const char *endless) {
    const char *out = in_folder("result");
    for (int round = 0; round < 20; round++) {
        int ends[2], status = 0;
        unlink(out);
        if (pipe(ends)) abort();
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            dup2(ends[0], 0), close(ends[1]);
            alarm(patience(20));
            execl(program(), program(), endless, "-i", "-", "-o", out, "-q", NULL);
            _exit(98);
        }
        bool caught = catches_signals(pid);
        if (caught) usleep((useconds_t)below(4000)), kill(pid, SIGINT);
        else close(ends[1]);
        waitpid(pid, &status, 0);
        close(ends[0]);
        if (!caught) continue;
        close(ends[1]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 130, "Ctrl-C while waiting: status %x",
              (unsigned)status);
        CHECK(access(out, F_OK), "and there is no output");
    }
}

static void test_signals(void) {
    if (no_program()) return;
    free(save_tiny().p);
    save_endless();
    test_signals_while_waiting(in_folder("endless.bin"));
    const char *endless = in_folder("endless.bin"), *out = in_folder("result");
    char *big = get(20001, 1);
    for (int i = 0; i < 20000; i++) big[i] = "abc d ca"[below(8)];
    const char *text = save("long", big, 20000);
    free(big);
    Ran r = RUN(endless, "-m", "compress", "-f", text, "-o", in_folder("small"), "-q");
    free_ran(&r);
    const char *const commands[][12] = {
        {"-i", "abc", "-n", "0", "-j", "2"}, {"-i", "abc", "-n", "100000", "-o", out},
        {"-i", "abc", "-n", "90000", "-k", "3", "-o", out},
        {"-i", "abc", "-n", "90000", "-e", endless, "-o", out},
        {"-i", "abc", "-n", "90000", "-S", in_folder("session"), "-c", "4096"},
        {"-i", "1+1=", "-n", "3", "-T", "sleep 3"}, {"-i", "abc", "-n", "90000", "-d", "lookup"},
        {"-m", "chat", "-n", "90000", "-i", "abc"}, {"-m", "eval", "-f", text, "-o", out},
        {"-m", "compress", "-f", text, "-o", out},
        {"-m", "decompress", "-f", in_folder("small"), "-o", out},
        {"-m", "explain", "-i", "abc", "-n", "900", "-c", "999", "-o", out},
        {"-m", "logits", "-f", save("ids", "1 2 3 4 5 6 7 8 9", 17), "-o", out}};
    int n = sizeof commands / sizeof *commands,
        rounds = getenv("ROUNDS") ? atoi(getenv("ROUNDS")) : 60;
    for (int round = 0; round < rounds; round++) {
        const char *argv[20] = {program(), endless, "-s", "1", "-q"};
        for (int i = 0; commands[round % n][i]; i++) argv[5 + i] = commands[round % n][i];
        unlink(out), unlink(in_folder("session"));
        int files = files_in_folder();
        save("result", "old", 3);
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            int null = open("/dev/null", O_RDWR);
            for (int i = 0; i < 3; i++) dup2(null, i);
            alarm(patience(20));
            signal(SIGHUP, SIG_DFL);  // though the tests may run under nohup
            setenv("ASAN_OPTIONS", "detect_leaks=0", 1);  // an exit in the middle frees nothing
            execv(argv[0], (char *const *)(uintptr_t)argv);
            _exit(98);
        }
        int status = 0, kind = (int[]){SIGINT, SIGTERM, SIGHUP}[below(3)];
        bool caught = catches_signals(pid);
        usleep((useconds_t)below(30000));
        if (caught) kill(pid, kind);
        if (caught && below(3) == 0) usleep((useconds_t)below(2000)), kill(pid, kind);
        waitpid(pid, &status, 0);
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        CHECK(code == 0 || (code >= 129 && code <= 130) || code == 143,
              "%s %s %s with signal %d ends with %d",
              argv[5], argv[6], argv[7], kind, WIFSIGNALED(status) ? -WTERMSIG(status) : code);
        struct stat st;
        CHECK(!stat(out, &st) && st.st_size, "-o is what it was, or has a result");
        unlink(out), unlink(in_folder("session"));
        CHECK(files_in_folder() <= files, "and leaves no temporary file");
    }
}

// The map of run.c in README.md: each `name` (number) must stand in that line of run.c.
static void test_map(void) {
    Buffer readme = slurp("README.md"), source = slurp("run.c");
    int seen = 0;
    for (char *p = (char *)readme.p; readme.n && (p = strstr(p, "` (")); p++) {
        char *end, *name = p;
        long number = strtol(p + 3, &end, 10), line = 1;
        if (end == p + 3 || *end != ')') continue;
        while (name[-1] != '`') name--;
        char *at = (char *)source.p;
        while (at && line < number) at = strchr(at, '\n'), at += at != NULL, line++;
        size_t length = at ? strcspn(at, "\n") : 0, n = (size_t)(p - name);
        bool there = false;
        bool part = !strncmp(name, "Part ", 5);
        for (size_t i = 0; i + n <= length; i++)
            there |= !memcmp(at + i, name, n) && (part || at[i + n] == '(');
        CHECK(there, "line %ld of run.c has %.*s, as README.md says (.ci/map corrects it)", number,
              (int)n, name);
        seen++;
    }
    if (!readme.n || !source.n) skip(1, "README.md's map: not in this folder");
    else CHECK(seen > 20, "README.md has a map of run.c");
    free(readme.p), free(source.p);
}

// =================================================================================================
// 14. Real models, where they are
// =================================================================================================

static const char sample_text[] =
    "The sun is a star at the centre of the solar system. It is a hot ball of plasma, and it gives "
    "the Earth its light and warmth. Without it there would be no plants, no animals and no "
    "people.";

static void test_real_model(void) {
    if (access("model.bin", R_OK)) {
        skip(8, "the real model: there is no model.bin here; make demo fetches it");
        return;
    }
    if (no_program()) return;
    Ran r = RUN("model.bin", "-i", "The capital of France is", "-t", "0", "-n", "8", "-q");
    CHECK(r.status == 0 && !strncmp((char *)r.out.p, "The capital of France is Paris.", 31),
          "the capital of France is Paris: %s%s", r.out.p, r.err.p);
    free_ran(&r);
    prints(RUN("model.bin", "-m", "check", "-q"), "ok\n", "the model passes its check");
    uint64_t hashes[3];
    static const char *const threads[] = {"1", "2", "3"};
    for (int i = 0; i < 3; i++) {
        r = RUN("model.bin", "-m", "logits", "-i", "504 3575 282 4649 314 7042 30 198 198 504",
                "-j", threads[i]);
        hashes[i] = hash64(r.out.p, r.out.n);
        CHECK(r.status == 0 && r.out.n == 10 * 49152 * 4 && hashes[i] == hashes[0],
              "its logits are the same with -j %s", threads[i]);
        free_ran(&r);
    }
    double bits = 0;
    r = RUN("model.bin", "-m", "eval", "-i", sample_text, "-q");
    CHECK(r.status == 0 && sscanf((char *)r.out.p, "bits_per_byte: %lf", &bits) == 1 &&
              bits > 0.4 && bits < 1.2,
          "it predicts an English text in about 0.8 bits per byte: %s%s", r.out.p, r.err.p);
    free_ran(&r);
    How how = {.input = "Hello, world! It's 2026; we've 1234567 things."};
    prints(RUN_AS(how, "model.bin", "-m", "tokenize", "-i", "-"),
           "19556 28 905 17 657 506 216 34 32 34 38 43 392 3543 216 33 34 35 36 37 38 39 1495 30\n",
           "tokenize prints its ids");
    r = RUN("model.bin", "-i", "The capital of France is", "-n", "12", "-s", "1", "--receipt",
            "-q");
    Ran same = RUN("model.bin", "-i", "The capital of France is", "-n", "12", "-s", "1",
                   "--receipt", "-q", "-j", "1");
    CHECK(r.status == 0 && !strcmp((char *)r.out.p, (char *)same.out.p) &&
              !strcmp((char *)r.err.p, (char *)same.err.p),
          "it writes the same text with the same receipt again");
    free_ran(&r), free_ran(&same);
}

static void test_stories(void) {
    static const char *const at = "../shared/llama2c/";
    if (access("../shared/llama2c/stories260K.bin", R_OK)) {
        skip(3, "llama2.c's texts: there is no ../shared/llama2c here");
        return;
    }
    if (no_program()) return;
    struct { const char *file, *t, *p, *s, *n, *prompt; } texts[] = {
        {"greedy-n200.txt", "0", "0.9", "1", "200", ""},
        {"t1.0-p0.9-s42-n200.txt", "1.0", "0.9", "42", "200", ""},
        {"t0.8-p1.0-s7-n120-one-day-tom.txt", "0.8", "1.0", "7", "120", "One day, Tom"}};
    for (int i = 0; i < 3; i++) {
        char path[100];
        snprintf(path, sizeof path, "%s%s", at, texts[i].file);
        Buffer expected = slurp(path);
        prints(RUN("../shared/llama2c/stories260K.bin", "-z", "../shared/llama2c/tok512.bin", "-t",
                   texts[i].t, "-p", texts[i].p, "-s", texts[i].s, "-n", texts[i].n, "-i",
                   texts[i].prompt),
               (char *)expected.p, texts[i].file);
        free(expected.p);
    }
}

// Reads the numbers behind "name": [ in a JSON file.
static int numbers_of(const Buffer *json, const char *name, int *out, int most) {
    char key[40];
    snprintf(key, sizeof key, "\"%s\": [", name);
    const char *p = strstr((char *)json->p, key);
    int n = 0;
    for (p = p ? p + strlen(key) : ""; n < most && *p && *p != ']'; p += *p == ',')
        out[n++] = (int)strtol(p, (char **)(uintptr_t)&p, 10);
    return n;
}

static void test_tiny_families(void) {
    static const char *const names[] = {"tiny-llama", "tiny-llama3-rope", "tiny-mistral",
                                        "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"};
    const char *models = getenv("MODELS");
    for (int i = 0; i < 6; i++) {
        char path[400], from[200];
        snprintf(path, sizeof path, "%.300s/%s-f32.bin", models ? models : "", names[i]);
        snprintf(from, sizeof from, "../shared/reference/%s/expected_logits.npy", names[i]);
        if (!models || access(path, R_OK) || access(from, R_OK)) {
            skip(2, "%s: needs MODELS=folder with %s-f32.bin, and ../shared", names[i], names[i]);
            continue;
        }
        Buffer npy = slurp(from);
        snprintf(from, sizeof from, "../shared/reference/%s/expected.json", names[i]);
        Buffer json = slurp(from);
        int ids[96], greedy[32], n = numbers_of(&json, "ids", ids, 48);
        int n_greedy = numbers_of(&json, "greedy", greedy, 32);
        int wrong = 0, vocab;
        Model m;
        load_model(&m, path);
        vocab = m.c.vocab_size;
        const uint8_t *expected = npy.p + npy.n - (size_t)(n * vocab) * 4;
        Cache kv;
        new_cache(&kv, &m, 96, 0, 0);
        Slot batch[96];
        for (int j = 0; j < n; j++) batch[j] = (Slot){ids[j], j, 0, true};
        const float *logits = forward(&m, &kv, batch, n);
        double worst = npy.n > (size_t)(n * vocab) * 4 && n == 48 ? 0 : 1e9;
        for (int j = 0; j < n * vocab && worst < 1e8; j++) {
            float x;
            memcpy(&x, expected + 4 * (size_t)j, 4);
            worst = worse(worst, fabs((double)x - (double)logits[j]));
        }
        CHECK(worst < 1e-3, "%s: logits are those of the reference: off by %g", names[i], worst);
        logits += (n - 1) * vocab;
        for (int j = 0; j < n_greedy; j++) {
            int next = argmax(logits, vocab);
            wrong += next != greedy[j];
            logits = forward(&m, &kv, &(Slot){next, n + j, 0, true}, 1);
        }
        CHECK(!wrong && n_greedy > 3, "%s: so are %d greedy tokens: %d differ", names[i], n_greedy,
              wrong);
        free_cache(&kv), free_model(&m), free(npy.p), free(json.p);
    }
}

static void test_models(void) {
    test_real_model();
    test_stories();
    test_tiny_families();
}

// =================================================================================================
// main
// =================================================================================================

static bool finished;

// The closing line. A test that ends the program, as run.c's errors do, has failed.
static void finish(void) {
    if (!finished) CHECK(false, "the tests of this group come to their end");
    remove_folder();
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed,
           failed, skipped);
    fflush(stdout);
}

static void too_long(int signal_number) {
    static const char text[] = "test_all: a group of tests takes too long\n0 passed, 1 failed\n";
    (void)signal_number;
    if (write(1, text, sizeof text - 1) < 0) {}
    remove_folder();
    _exit(1);
}

#ifdef FUZZ
// =================================================================================================
// Fuzzing: `make fuzz` builds this file with clang's libFuzzer, and FUZZ=target names what is fed
// =================================================================================================
//
// An input may do anything but crash, hang, leak without bound or break an assertion. What carries
// a hash is sealed again after each mutation, so that the fuzzer gets behind the hash.

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
size_t LLVMFuzzerMutate(uint8_t *data, size_t n, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t most, unsigned seed);

static jmp_buf fuzz_end;
static struct { void *at; size_t n; } mapped[64];  // what an exit leaves mapped
static int n_mapped;
static void *owned[1 << 16];  // what run.c allocated since the input began, and has not freed
static int n_owned;
static pthread_mutex_t owned_mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *target;
static Model fuzz_model;
static Tokenizer fuzz_tokenizer, real_tokenizer;

static void *fuzz_mmap(void *at, size_t n, int protection, int flags, int fd, long offset) {
    void *p = mmap(at, n, protection, flags, fd, offset);
    if (p != MAP_FAILED && n_mapped < 64) mapped[n_mapped].at = p, mapped[n_mapped++].n = n;
    return p;
}
static int fuzz_munmap(void *at, size_t n) {
    for (int i = n_mapped; i--;)
        if (mapped[i].at == at) mapped[i] = mapped[--n_mapped];
    return munmap(at, n);
}
static void *fuzz_own(void *p) {
    pthread_mutex_lock(&owned_mutex);
    if (n_owned == sizeof owned / sizeof *owned) abort();
    if (p) owned[n_owned++] = p;
    pthread_mutex_unlock(&owned_mutex);
    return p;
}
static void *fuzz_disown(void *p) {
    pthread_mutex_lock(&owned_mutex);
    for (int i = n_owned; i--;)
        if (owned[i] == p) owned[i] = owned[--n_owned];
    pthread_mutex_unlock(&owned_mutex);
    return p;
}
static void fuzz_exit(int status) {
    if (status != 0 && status != 1 && status != 2 && status != 130) abort();
    longjmp(fuzz_end, 1);
}
// Runs one input; unmaps, frees and closes what an error left behind. Without one nothing is left.
static void guarded(void (*run)(const uint8_t *, size_t), const uint8_t *data, size_t n) {
    bool ours[64];
    for (int fd = 0; fd < 64; fd++) ours[fd] = fcntl(fd, F_GETFD) >= 0;
    n_mapped = n_owned = 0;
    interrupted = 0;
    if (!setjmp(fuzz_end)) {
        run(data, n);
        if (n_owned) abort();
    }
    recovery = NULL;
    remove_unfinished();
    n_unfinished = 0;
    for (int i = 0; i < n_mapped; i++) munmap(mapped[i].at, mapped[i].n);
    for (int i = 0; i < n_owned; i++) (free)(owned[i]);
    for (int fd = 0; fd < 64; fd++)
        if (!ours[fd]) close(fd);
}

static void fuzz_checkpoint(const uint8_t *data, size_t n) {
    Model m;
    Cache kv;
    load_model(&m, save("input", data, n));
    int ctx = m.c.seq_len < 8 ? m.c.seq_len : 8, vocab = m.c.vocab_size;
    new_cache(&kv, &m, ctx, 0, 0);
    Slot batch[8];
    for (int i = 0; i < ctx; i++) batch[i] = (Slot){i * 7 % vocab, i, 0, true};
    forward(&m, &kv, batch, ctx);
    free_cache(&kv);
    Options o = {.quiet = true};
    Output out = {.fd = -1};
    check_model(&o, &m, &fuzz_tokenizer, &out);
    free(out.memory);
    free_model(&m);
}

static void code(const Tokenizer *t, const uint8_t *data, size_t n, bool lossless) {
    Text text = {(const char *)data, n};
    char *typed = get(n + 1, 1);
    memset(typed, 1, n);
    for (int how = 0; how < 4; how++) {
        Ids ids = {0};
        Buffer back = {0};
        encode(t, text, how & 1 ? typed : NULL, how & 2, &ids);
        for (size_t i = 0; i < ids.n; i++) {
            if (ids.ids[i] < 0 || ids.ids[i] >= t->h.vocab_size) abort();
            Text piece = decode(t, i ? ids.ids[i - 1] : -1, ids.ids[i]);
            put(&back, piece.s, piece.len);
        }
        if (lossless && how == 1 && (back.n != n || (n && memcmp(back.p, data, n)))) abort();
        free(ids.ids), free(back.p);
    }
    free(typed);
}
static void fuzz_tokenizer_file(const uint8_t *data, size_t n) {
    Model m = {.path = "input"};
    Tokenizer t = {0};
    m.c.vocab_size = n > 24 && data[0] == 't' ? (int)read_u32(data + 20) : n ? data[0] % 40 : 0;
    if (m.c.vocab_size < 1 || m.c.vocab_size > 1 << 24) return;
    const char *wrong = load_tokenizer(&t, save("input", data, n), &m);
    if (!wrong) code(&t, data + (n > 300 ? n - 300 : 0), n > 300 ? 300 : n, false);
    static const char text[] = "a <s> caf\xc3\xa9 12\n";
    if (!wrong) code(&t, (const uint8_t *)text, sizeof text - 1, false);
    free_tokenizer(&t);
}
static void fuzz_encode(const uint8_t *data, size_t n) {
    code(&fuzz_tokenizer, data, n, true);
    code(&real_tokenizer, data, n, false);
}

static void run_arguments(int n, char **arguments) {
    fflush(stdout);
    run_main(n, arguments);
}
static void fuzz_session(const uint8_t *data, size_t n) {
    save("session", data, n);
    char *go_on[] = {"run", "endless.bin", "-S", "session", "-q", "-n", "3", "-j", "1", "-t", "0",
                     "-o", "/dev/null", NULL};
    run_arguments(13, go_on);
}
static void fuzz_chat(const uint8_t *data, size_t n) {
    char *talk[] = {"run", "endless.bin", "-m", "chat", "-q", "-n", "3", "-j", "1", "-s", "1", "-c",
                    "64", "-o", "/dev/null", NULL};
    uint8_t *lines_ = get(n, 1);
    for (size_t i = 0; i < n; i++)  // files in this folder only
        lines_[i] = data[i] == '/' && i && data[i - 1] != '\n' ? '_' : data[i];
    if (!freopen(save("stdin", lines_, n), "r", stdin)) abort();
    free(lines_);
    run_arguments(15, talk);
}
static void fuzz_compressed(const uint8_t *data, size_t n) {
    save("input", data, n);
    char *back[] = {"run", "endless.bin", "-m", "decompress", "-f", "input", "-q", "-j", "1", "-o",
                    "/dev/null", NULL};
    run_arguments(11, back);
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
        char *word = words[data[i] % n_words];
        if (!strcmp(word, "bench")) word = "check";  // it takes seconds
        // A whole file of a model as a text takes minutes in this build.
        if (!strcmp(argv[argc - 1], "-f") && strstr(word, ".")) word = "prompt";
        argv[argc++] = word;
    }
    save("prompt", "abc d\n", 6);
    if (!freopen(in_folder("prompt"), "r", stdin)) abort();
    run_arguments(argc, argv);
}

static const struct { const char *name; void (*run)(const uint8_t *, size_t); } targets[] = {
    {"checkpoint", fuzz_checkpoint}, {"tokenizer", fuzz_tokenizer_file}, {"encode", fuzz_encode},
    {"session", fuzz_session}, {"compressed", fuzz_compressed}, {"chat", fuzz_chat},
    {"command", fuzz_command}};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (!strcmp(target, targets[i].name)) guarded(targets[i].run, data, n);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t most, unsigned seed) {
    n = LLVMFuzzerMutate(data, n, most);
    Buffer b = {data, n, n};
    if (seed % 8 == 0) return n;
    if (!strcmp(target, "checkpoint") && n >= 256 && read_u32(data + 4) == 3) {
        if (n > 120) set64(data + 112, n);
        seal(&b);
    }
    if (!strcmp(target, "tokenizer") && n > 80 && !memcmp(data, "tok3", 4))
        set64(data + 8, hash_of(data + 16, n - 16));
    if (!strcmp(target, "compressed") && n > 24) {  // its checksums, and sizes that take no minutes
        uint64_t header[3] = {(uint64_t)(16 + data[4] % 64) << 32 | MAGIC,
                              fuzz_model.c.content_hash, fuzz_tokenizer.h.hash};
        memcpy(data, header, 24);
        uint64_t check = hash64(data, 24);
        for (size_t at = 24, left; at + 33 < n; at += left + 32) {
            BlockHead h;
            memcpy(&h, data + at, 24);
            left = n - at - 32;
            h.bytes %= 400, h.pieces %= 400;
            if (h.coded < left) left = h.coded;
            h.coded = (uint32_t)left;
            memcpy(data + at, &h, 24);
            check = check_block(check, &h, data + at + 24);
            set64(data + at + 24 + left, check);
        }
    }
    if (!strcmp(target, "session") && n > sizeof(SessionHeader)) {
        SessionHeader h;
        memcpy(&h, data, sizeof h);
        memcpy(h.magic, session_magic, 8);
        h.hash = hash64(&h, offsetof(SessionHeader, hash));
        for (int i = 0; i < 2; i++) seal_state(&h.states[i]);
        memcpy(data, &h, sizeof h);
    }
    return n;
}

// Writes the seeds of a target into a folder.
static void seed_corpus(const char *where) {
    char path[600];
    int n = 0;
#define SEED(bytes, size)                                                                          \
    do {                                                                                           \
        snprintf(path, sizeof path, "%s/seed%d", where, n++);                                      \
        FILE *f = fopen(path, "wb");                                                               \
        if (!f || fwrite(bytes, 1, size, f) != (size) || fclose(f)) abort();                       \
    } while (0)
    if (!strcmp(target, "checkpoint"))
        for (int which = 0; which < N_FAMILIES; which++)
            for (int dtype = ROWS; dtype <= Q4A; dtype++) {
                if (dtype == ROWS && which != LLAMA) continue;
                Shape s = family(which, dtype);
                s.vocab = 20, s.layers = 1, s.dim = 32, s.hidden = 32, s.heads = s.kv_heads = 1;
                s.head_dim = 16, s.seq_len = 32;
                for (int version = 0; version < (dtype == ROWS ? 2 : 1); version++) {
                    Made m = make_weights(&s);
                    if (dtype != ROWS) certify(&m);
                    Buffer b = dtype == ROWS ? llama2c_file(&m, version) : version_3(&m);
                    SEED(b.p, b.n);
                    free(b.p), free_made(&m);
                }
            }
    if (!strcmp(target, "tokenizer")) {
        Vocabulary *v = tiny_vocabulary();
        Buffer b = tokenizer_file(v);
        SEED(b.p, b.n);
        free(b.p), free_vocabulary(v);
    }
    if (!strcmp(target, "session")) {
        char *make[] = {"run", "endless.bin", "-S", "made", "-q", "-n", "5", "-j", "1", "-i", "abc",
                        "-o", "/dev/null", "-c", "100", NULL};
        if (!setjmp(fuzz_end)) run_main(15, make);
        Buffer b = slurp("made");
        SEED(b.p, b.n);
        free(b.p);
    }
    if (!strcmp(target, "compressed")) {
        char *make[] = {"run", "endless.bin", "-m", "compress", "-i", "abc d abc d \xff\xfe cab d",
                        "-q", "-j", "1", "-c", "40", "-o", "made", NULL};
        if (!setjmp(fuzz_end)) run_main(13, make);
        Buffer b = slurp("made");
        SEED(b.p, b.n);
        free(b.p);
    }
    static const char lines_[] = "Hi\n/save a\n/undo\n/load a\nabc\n", words[] = "\0\x9\xa\x11\x12";
    SEED(lines_, sizeof lines_ - 1);
    SEED(words, sizeof words - 1);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    target = getenv("FUZZ");
    const char *temporary = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.200s/fuzz.XXXXXX", temporary ? temporary : "/tmp");
    if (!target || !mkdtemp(folder) || chdir(folder)) fprintf(stderr, "FUZZ=target?\n"), _exit(1);
    Buffer b = save_tiny();
    free(b.p);
    save_endless();
    Shape s = family(LLAMA, ROWS);
    s.vocab = 278, s.layers = 1;
    Made m = make_weights(&s);
    b = llama2c_file(&m, 0);
    save("llama.bin", b.p, b.n);
    free(b.p), free_made(&m);
    load_model(&fuzz_model, in_folder("endless.bin"));
    find_tokenizer(&fuzz_tokenizer, NULL, &fuzz_model);
    static Model real = {.path = "tokenizer.bin", .c.vocab_size = 49152};
    const char *path = getenv("FUZZ_TOKENIZER");
    if (path && load_tokenizer(&real_tokenizer, path, &real)) abort();
    if (getenv("FUZZ_SEEDS")) seed_corpus(getenv("FUZZ_SEEDS")), _exit(0);
    return 0;
}
#else
int main(int argc, char **argv) {
    static const struct { const char *name; void (*test)(void); } groups[] = {
        {"numbers", test_numbers}, {"quantize", test_quantize}, {"products", test_products},
        {"attention", test_attention}, {"forward", test_forward},
        {"same-bytes", test_same_everywhere}, {"sampler", test_sampler},
        {"tokenizer", test_tokenizer}, {"files", test_files}, {"command line", test_command_line},
        {"decoders", test_decoders}, {"explain", test_explain}, {"compress", test_compression},
        {"faults", test_faults}, {"signals", test_signals},
        {"map", test_map},
        {"models", test_models}};
    if (argc == 3 && !strcmp(argv[1], "--tiny")) {
        snprintf(folder, sizeof folder, "%s", argv[2]);
        free(save_tiny().p);
        return 0;
    }
    strcpy(folder, "/tmp/test_all.XXXXXX");
    if (!mkdtemp(folder)) perror(folder), exit(1);
    signal(SIGALRM, too_long);
    atexit(finish);
    int ran = 0;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        if (argc > 1 && !strstr(groups[i].name, argv[1])) continue;
        int passed_before = passed, failed_before = failed, skipped_before = skipped;
        double start = seconds();
        group = groups[i].name;
        random_state = i + 1;
        alarm(patience(300));
        groups[i].test();
        printf("%-13s %5d passed, %d failed, %d skipped  %5.1f s\n", group, passed - passed_before,
               failed - failed_before, skipped - skipped_before, seconds() - start);
        fflush(stdout);
        ran++;
    }
    if (!ran) CHECK(false, "there is a group called %s", argv[1]);
    finished = true;
    return failed > 0;
}
#endif
#endif

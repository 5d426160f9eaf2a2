/* SMCA's attention and matching in C: an example of a program that the conformance suite checks.

       cc -O2 -std=c11 -Wall -Wextra -o port port.c -lm
       smca conformance --implementation 'exec:./port'    the suite asks, the program answers
       ./port FILE...                                     the program checks itself against vectors in files

   To write a port of your own, copy this file, put your code in place of part 1, and list its operations in part 3. The
   other parts can stay as they are.

       Part 1  the operations: read the arguments, compute, give the results
       Part 2  messages: safetensors files in memory
       Part 3  the table of operations
       Part 4  questions on standard input, answers on standard output (conformance/implementations/port.py)
       Part 5  vectors: files with arguments, expected results and their bounds (conformance/vectors.py). The command
               smca conformance --write-vectors FOLDER writes them

   The compiler reads part 1 twice, with REAL as double and as float: the file includes itself. Keep its name, or change
   the two lines #include "port.c". */

#ifdef REAL

/* ---- Part 1: the operations -----------------------------------------------------------------------------------------

   IN(name) is name_float64 or name_float32. Functions of <tgmath.h> have the type of their argument: exp of a float is
   expf. Constants are integers or casts, because 0.5 alone is a double and would make its whole expression one.

   Arrays are row-major. B images, h heads, N queries, L keys, d channels. */

static REAL *IN(zeros)(size_t count)
{
    return allocate(count, sizeof(REAL));
}

/* The numbers of an argument, rounded to REAL. */
static REAL *IN(reals)(const tensor *t)
{
    REAL *numbers = IN(zeros)(t->count);
    for (size_t i = 0; i < t->count; i++)
        numbers[i] = (REAL)value(t, i);
    return numbers;
}

/* Room for a result. It holds zeros. */
static REAL *IN(result)(message *answer, const char *name, int axes, const size_t *shape)
{
    return add_result(answer, name, sizeof(REAL) == 8 ? "F64" : "F32", axes, shape);
}

/* The inputs of attention over one map, or those of one head of it. */
typedef struct {
    size_t images, heads, queries, keys, channels, width;
    REAL *q, *k, *v, *center, *precision; /* [B, h, N, d], [B, h, L, d] twice, [B, h, N, 2] twice */
    bool *padded;                         /* [B, L] */
} IN(attention);

/* Reads q from `ask` and the rest from `level`. The two are the same where there is one map. */
static IN(attention) IN(read_attention)(const message *ask, const message *level)
{
    const tensor *q = argument(ask, "q", SHAPE(ANY, ANY, ANY, ANY)), *size = argument(level, "size", SHAPE(2));
    size_t B = q->shape[0], h = q->shape[1], N = q->shape[2], d = q->shape[3];
    size_t width = whole(size, 1, 1, LARGEST), L = whole(size, 0, 1, LARGEST) * width;
    if (d == 0)
        fail("q: expected at least one channel");
    IN(attention) a = {B, h, N, L, d, width, .q = IN(reals)(q)};
    a.k = IN(reals)(argument(level, "k", SHAPE(B, h, L, d)));
    a.v = IN(reals)(argument(level, "v", SHAPE(B, h, L, d)));
    a.center = IN(reals)(argument(level, "center_xy", SHAPE(B, h, N, 2)));
    a.precision = IN(reals)(argument(level, "precision_xy", SHAPE(B, h, N, 2)));
    a.padded = allocate(B * L, sizeof *a.padded);
    if (find(level, level->prefix, "key_padding_mask")) {
        const tensor *mask = argument(level, "key_padding_mask", SHAPE(B, L));
        for (size_t i = 0; i < mask->count; i++)
            a.padded[i] = value(mask, i) != 0;
    }
    return a;
}

/* Head i of the B·h heads. */
static IN(attention) IN(head)(const IN(attention) *all, size_t i)
{
    IN(attention) a = *all;
    a.q += i * a.queries * a.channels;
    a.k += i * a.keys * a.channels;
    a.v += i * a.keys * a.channels;
    a.center += i * a.queries * 2;
    a.precision += i * a.queries * 2;
    a.padded += i / a.heads * a.keys;
    return a;
}

/* The position of a key minus the centre of query n, along x (axis 0) or y (axis 1). A cell's centre is (column + 1/2,
   row + 1/2). */
static REAL IN(offset)(const IN(attention) *a, size_t n, size_t key, size_t axis)
{
    size_t cell = axis == 0 ? key % a->width : key / a->width;
    return (REAL)cell + (REAL)0.5 - a->center[n * 2 + axis];
}

/* The weights of the keys for query n of one head: softmax over the keys of q·k/sqrt(d) + log G. Padded keys get 0, and
   what they hold is not read. */
static void IN(weigh)(const IN(attention) *a, size_t n, REAL *weight)
{
    const REAL *q = a->q + n * a->channels, *precision = a->precision + n * 2;
    REAL largest = (REAL)-INFINITY, sum = 0;
    size_t real = 0;
    for (size_t l = 0; l < a->keys; l++) {
        if (a->padded[l])
            continue;
        REAL dot = 0, x = IN(offset)(a, n, l, 0), y = IN(offset)(a, n, l, 1);
        for (size_t c = 0; c < a->channels; c++)
            dot += q[c] * a->k[l * a->channels + c];
        weight[l] = dot / sqrt((REAL)a->channels) - (precision[0] * x * x + precision[1] * y * y) / 2;
        largest = weight[l] > largest ? weight[l] : largest;
        real++;
    }
    if (real == 0)
        fail("key_padding_mask: expected at least one key in every image that is not padded");
    for (size_t l = 0; l < a->keys; l++) {
        weight[l] = a->padded[l] ? 0 : exp(weight[l] - largest); /* at most exp(0): no overflow */
        sum += weight[l];
    }
    for (size_t l = 0; l < a->keys; l++)
        weight[l] /= sum;
}

/* The weighted sums of the values, for all heads: out is [B, h, N, d] and holds zeros. */
static void IN(attend)(const IN(attention) *all, REAL *out)
{
    REAL *weight = IN(zeros)(all->keys);
    for (size_t i = 0; i < all->images * all->heads; i++) {
        IN(attention) a = IN(head)(all, i);
        for (size_t n = 0; n < a.queries; n++, out += a.channels) {
            IN(weigh)(&a, n, weight);
            for (size_t l = 0; l < a.keys; l++)
                for (size_t c = 0; c < a.channels && !a.padded[l]; c++)
                    out[c] += weight[l] * a.v[l * a.channels + c];
        }
    }
}

static void IN(smca_attention)(const message *ask, message *answer)
{
    IN(attention) a = IN(read_attention)(ask, ask);
    IN(attend)(&a, IN(result)(answer, "out", SHAPE(a.images, a.heads, a.queries, a.channels)));
}

/* Equations (7) to (12) of reference/attention_backward.py. */
static void IN(smca_attention_vjp)(const message *ask, message *answer)
{
    IN(attention) all = IN(read_attention)(ask, ask);
    size_t B = all.images, h = all.heads, N = all.queries, L = all.keys, d = all.channels;
    REAL *grad_out = IN(reals)(argument(ask, "grad_out", SHAPE(B, h, N, d)));
    REAL *dq = IN(result)(answer, "dq", SHAPE(B, h, N, d));
    REAL *dk = IN(result)(answer, "dk", SHAPE(B, h, L, d));
    REAL *dv = IN(result)(answer, "dv", SHAPE(B, h, L, d));
    REAL *dcenter = IN(result)(answer, "dcenter_xy", SHAPE(B, h, N, 2));
    REAL *dprecision = IN(result)(answer, "dprecision_xy", SHAPE(B, h, N, 2));
    REAL *weight = IN(zeros)(L), *dweight = IN(zeros)(L), root_d = sqrt((REAL)d);
    for (size_t i = 0; i < B * h; i++, dk += L * d, dv += L * d) {
        IN(attention) a = IN(head)(&all, i);
        for (size_t n = 0; n < N; n++, grad_out += d, dq += d, dcenter += 2, dprecision += 2) {
            REAL mean = 0;
            IN(weigh)(&a, n, weight);
            for (size_t l = 0; l < L; l++) {
                dweight[l] = 0;
                for (size_t c = 0; c < d && !a.padded[l]; c++) {
                    dv[l * d + c] += weight[l] * grad_out[c];
                    dweight[l] += grad_out[c] * a.v[l * d + c];
                }
                mean += weight[l] * dweight[l];
            }
            for (size_t l = 0; l < L; l++) {
                if (a.padded[l])
                    continue;
                REAL dlogit = weight[l] * (dweight[l] - mean);
                for (size_t c = 0; c < d; c++) {
                    dq[c] += dlogit * a.k[l * d + c] / root_d;
                    dk[l * d + c] += dlogit * a.q[n * d + c] / root_d;
                }
                for (size_t axis = 0; axis < 2; axis++) {
                    REAL difference = IN(offset)(&a, n, l, axis);
                    dcenter[axis] += dlogit * a.precision[n * 2 + axis] * difference;
                    dprecision[axis] -= dlogit * difference * difference / 2;
                }
            }
        }
    }
}

/* The sum over levels j of level_weights [B, N, J], which the heads share, times the attention over level j alone. */
static void IN(multi_scale_smca_attention)(const message *ask, message *answer)
{
    const tensor *q = argument(ask, "q", SHAPE(ANY, ANY, ANY, ANY));
    size_t B = q->shape[0], h = q->shape[1], N = q->shape[2], d = q->shape[3];
    const tensor *weights = argument(ask, "level_weights", SHAPE(B, N, ANY));
    size_t levels = weights->shape[2];
    REAL *level_weights = IN(reals)(weights), *mixed = IN(result)(answer, "out", SHAPE(B, h, N, d));
    for (size_t j = 0; j < levels; j++) {
        message level = *ask;
        level.prefix = written("%slevels.%zu.", ask->prefix, j);
        IN(attention) a = IN(read_attention)(ask, &level);
        REAL *out = IN(zeros)(q->count);
        IN(attend)(&a, out);
        for (size_t i = 0; i < q->count; i++) {
            size_t n = i / d % N, image = i / d / N / h;
            mixed[i] += level_weights[(image * N + n) * levels + j] * out[i];
        }
    }
}

/* 0 where both are 0. */
static REAL IN(ratio)(REAL part, REAL whole)
{
    return whole == 0 ? 0 : part / whole;
}

/* GIoU of two boxes (left, top, right, bottom). */
static REAL IN(giou)(const REAL *a, const REAL *b)
{
    REAL inner[2], outer[2];
    for (size_t low = 0, high = 2; low < 2; low++, high++) {
        if (a[high] < a[low] || b[high] < b[low])
            fail("expected boxes with left <= right and top <= bottom");
        inner[low] = (a[high] < b[high] ? a[high] : b[high]) - (a[low] > b[low] ? a[low] : b[low]);
        outer[low] = (a[high] > b[high] ? a[high] : b[high]) - (a[low] < b[low] ? a[low] : b[low]);
        inner[low] = inner[low] < 0 ? 0 : inner[low];
    }
    REAL shared = inner[0] * inner[1], hull = outer[0] * outer[1];
    REAL covered = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared;
    return IN(ratio)(shared, covered) - IN(ratio)(hull - covered, hull);
}

static void IN(generalized_box_iou)(const message *ask, message *answer)
{
    const tensor *first = argument(ask, "boxes1", SHAPE(ANY, 4)), *second = argument(ask, "boxes2", SHAPE(ANY, 4));
    size_t n = first->shape[0], m = second->shape[0];
    REAL *boxes1 = IN(reals)(first), *boxes2 = IN(reals)(second), *giou = IN(result)(answer, "giou", SHAPE(n, m));
    for (size_t i = 0; i < n * m; i++)
        giou[i] = IN(giou)(boxes1 + i / m * 4, boxes2 + i % m * 4);
}

/* ln(1 + exp(x)), which is -ln sigmoid(-x). Neither overflows, nor does sigmoid below. */
static REAL IN(softplus)(REAL x)
{
    return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
}

static REAL IN(sigmoid)(REAL x)
{
    REAL decayed = exp(-fabs(x));
    return (x >= 0 ? 1 : decayed) / (1 + decayed);
}

/* (centre x, centre y, width, height) as (left, top, right, bottom). */
static void IN(corners)(const REAL *box, REAL *corners)
{
    for (size_t axis = 0; axis < 2; axis++) {
        corners[axis] = box[axis] - box[axis + 2] / 2;
        corners[axis + 2] = box[axis] + box[axis + 2] / 2;
    }
}

/* Equations (A1) and (A2) of reference/matching.py with alpha = 1/4 and gamma = 2. */
static void IN(match_cost)(const message *ask, message *answer)
{
    const tensor *scores = argument(ask, "logits", SHAPE(ANY, ANY)), *labels = argument(ask, "labels", SHAPE(ANY));
    size_t N = scores->shape[0], K = scores->shape[1], T = labels->shape[0];
    REAL *logits = IN(reals)(scores), *boxes = IN(reals)(argument(ask, "boxes", SHAPE(N, 4)));
    REAL *target_boxes = IN(reals)(argument(ask, "target_boxes", SHAPE(T, 4)));
    REAL weight_class = (REAL)value(argument(ask, "weights.class", 0, NULL), 0);
    REAL weight_l1 = (REAL)value(argument(ask, "weights.l1", 0, NULL), 0);
    REAL weight_giou = (REAL)value(argument(ask, "weights.giou", 0, NULL), 0);
    REAL *cost = IN(result)(answer, "cost", SHAPE(N, T));
    for (size_t n = 0; n < N; n++)
        for (size_t t = 0; t < T; t++) {
            REAL *box = boxes + n * 4, *target = target_boxes + t * 4, corners[4], target_corners[4], l1 = 0;
            REAL x = logits[n * K + whole(labels, t, 0, (double)K - 1)], p = IN(sigmoid)(x), rest = IN(sigmoid)(-x);
            REAL positive = rest * rest * IN(softplus)(-x) / 4, negative = 3 * p * p * IN(softplus)(x) / 4;
            for (size_t i = 0; i < 4; i++)
                l1 += fabs(box[i] - target[i]);
            IN(corners)(box, corners);
            IN(corners)(target, target_corners);
            cost[n * T + t] = weight_class * (positive - negative) + weight_l1 * l1
                            - weight_giou * IN(giou)(corners, target_corners);
        }
}

/* The assignment of least total cost by shortest augmenting paths, steps 1 to 4 of reference/matching.py. Rows are here
   the shorter side of the matrix, n of them, and columns the longer one, m of them. */
static void IN(assign)(const message *ask, message *answer)
{
    const tensor *given = argument(ask, "cost", SHAPE(ANY, ANY));
    bool turned = given->shape[0] > given->shape[1];
    size_t n = given->shape[turned ? 1 : 0], m = n == 0 ? 0 : given->shape[turned ? 0 : 1];
    REAL *cost = IN(zeros)(n * m), *distance = IN(zeros)(m), *price_row = IN(zeros)(n), *price_column = IN(zeros)(m);
    size_t *column_of = allocate(n, sizeof(size_t)), *row_of = allocate(m, sizeof(size_t));
    size_t *came_from = allocate(m, sizeof(size_t));
    bool *settled = allocate(m, sizeof *settled);
    for (size_t i = 0; i < n * m; i++) {
        cost[i] = (REAL)value(given, turned ? i % m * n + i / m : i);
        if (!(cost[i] > (REAL)-INFINITY))
            fail("cost: expected numbers or +inf (a forbidden pair), got %g", (double)cost[i]);
    }
    for (size_t j = 0; j < m; j++)
        row_of[j] = FREE;
    for (size_t added = 0; added < n; added++) {
        size_t row = added, nearest;
        REAL walked = 0;
        for (size_t j = 0; j < m; j++)
            distance[j] = (REAL)INFINITY, settled[j] = false;
        for (;;) { /* Dijkstra: from the added row to the nearest free column */
            nearest = FREE;
            for (size_t j = 0; j < m; j++) {
                if (settled[j])
                    continue;
                REAL through_row = walked + (cost[row * m + j] - price_row[row] - price_column[j]);
                if (through_row < distance[j])
                    distance[j] = through_row, came_from[j] = row;
                if (distance[j] < (REAL)INFINITY && (nearest == FREE || distance[j] < distance[nearest]))
                    nearest = j;
            }
            if (nearest == FREE)
                fail("cost: expected that a complete assignment is possible, got too many pairs of +inf");
            walked = distance[nearest];
            if (row_of[nearest] == FREE)
                break;
            settled[nearest] = true;
            row = row_of[nearest];
        }
        price_row[added] += walked;
        for (size_t j = 0; j < m; j++)
            if (settled[j]) {
                price_row[row_of[j]] += walked - distance[j];
                price_column[j] -= walked - distance[j];
            }
        for (size_t j = nearest, next;; j = next) { /* back along the path: each row takes the column it led to */
            row = row_of[j] = came_from[j];
            next = column_of[row];
            column_of[row] = j;
            if (row == added)
                break;
        }
    }
    double *rows = add_result(answer, "rows", "F64", SHAPE(n)), *cols = add_result(answer, "cols", "F64", SHAPE(n));
    for (size_t i = 0, k = 0; i < (turned ? m : n); i++) {
        size_t partner = turned ? row_of[i] : column_of[i];
        if (partner != FREE)
            rows[k] = (double)i, cols[k] = (double)partner, k++;
    }
}

#else

/* ---- Part 2: messages -------------------------------------------------------------------------------------------- */

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#define LARGEST ((size_t)1 << 31) /* bytes of a message; also the largest extent of an axis */
#define MOST_AXES 8
#define ANY SIZE_MAX  /* as an extent: all are accepted */
#define FREE SIZE_MAX /* as a partner: none */
#define SHAPE(...) (int)(sizeof(size_t[]){__VA_ARGS__} / sizeof(size_t)), (size_t[]){__VA_ARGS__} /* axes, shape */

_Static_assert(sizeof(size_t) == 8 && sizeof(double) == 8, "this is written for machines with 64 bits, little-endian");

/* Errors. `fail` says what was wrong and goes back to where the question or the file was begun. */
static jmp_buf begun;
static char failure[512];

_Noreturn static void fail(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(failure, sizeof failure, format, values);
    va_end(values);
    for (char *c = failure; *c; c++) /* it may quote a message: keep what JSON holds as it is */
        if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
            *c = '?';
    longjmp(begun, 1);
}

/* Memory. It is 0 when it is allocated. All of it is freed at the end of the question or the file. */
typedef struct block {
    struct block *next;
    max_align_t data[];
} block;
static block *blocks;

static void *allocate(size_t count, size_t size)
{
    block *made = count > LARGEST * 8 / size ? NULL : calloc(1, sizeof(block) + count * size);
    if (!made)
        fail("there is not enough memory for %zu times %zu bytes", count, size);
    made->next = blocks;
    blocks = made;
    return made->data;
}

static void free_all(void)
{
    for (block *next; blocks; blocks = next) {
        next = blocks->next;
        free(blocks);
    }
}

/* As sprintf, into memory of its own. */
static char *written(const char *format, ...)
{
    va_list values, again;
    va_start(values, format);
    va_copy(again, values);
    size_t room = (size_t)vsnprintf(NULL, 0, format, values) + 1;
    char *text = allocate(room, 1);
    vsnprintf(text, room, format, again);
    va_end(values);
    va_end(again);
    return text;
}

/* A tensor, or (`text` is not NULL) a text of the metadata. */
typedef struct tensor {
    struct tensor *next;
    const char *name, *text;
    char kind[5]; /* "F64" and so on */
    int axes;
    size_t shape[MOST_AXES], count;
    const char *data;
} tensor;

typedef struct {
    tensor *tensors;
    const char *prefix; /* of arguments' names: "", or "in." in a file of vectors; of a level's, "levels.0." follows */
} message;

/* 0: no such dtype, or none that messages have. */
static size_t size_of(const char *kind)
{
    static const char *const kinds[] = {"F64", "F32", "I64", "I32", "U8", "BOOL"};
    static const size_t sizes[] = {8, 4, 8, 4, 1, 1};
    for (size_t i = 0; i < 6; i++)
        if (strcmp(kind, kinds[i]) == 0)
            return sizes[i];
    return 0;
}

/* Entry i as a double, which holds all kinds of numbers exactly (whole ones up to 2^53). */
static double value(const tensor *t, size_t i)
{
    union { double f64; float f32; int64_t i64; int32_t i32; uint8_t u8; } as;
    size_t size = size_of(t->kind);
    memcpy(&as, t->data + i * size, size);
    if (t->kind[0] == 'F')
        return size == 8 ? as.f64 : (double)as.f32;
    return size == 8 ? (double)as.i64 : size == 4 ? as.i32 : as.u8;
}

static size_t whole(const tensor *t, size_t i, double least, double most)
{
    double x = value(t, i);
    if (!(x >= least && x <= most && x == floor(x)))
        fail("%s: expected whole numbers from %g to %g, got %g", t->name, least, most, x);
    return (size_t)x;
}

static tensor *add_tensor(message *m, const char *name, const char *kind, int axes, const size_t *shape)
{
    tensor *t = allocate(1, sizeof *t);
    t->name = name, t->axes = axes, t->count = 1;
    strcpy(t->kind, kind);
    for (int i = 0; i < axes; i++) {
        if (shape[i] > LARGEST || t->count * shape[i] > LARGEST) /* both factors are at most 2^31 */
            fail("%s: it is too large", name);
        t->shape[i] = shape[i];
        t->count *= shape[i];
    }
    t->next = m->tensors;
    return m->tensors = t;
}

static void add_text(message *m, const char *name, const char *text)
{
    add_tensor(m, name, "", 0, NULL)->text = text;
}

/* Room for a result in the answer. It holds zeros. */
static void *add_result(message *m, const char *name, const char *kind, int axes, const size_t *shape)
{
    tensor *t = add_tensor(m, name, kind, axes, shape);
    void *data = allocate(t->count, size_of(kind));
    t->data = data;
    return data;
}

/* The tensor of a name, or NULL. */
static const tensor *find(const message *m, const char *prefix, const char *name)
{
    size_t length = strlen(prefix);
    for (const tensor *t = m->tensors; t; t = t->next)
        if (!t->text && strncmp(t->name, prefix, length) == 0 && strcmp(t->name + length, name) == 0)
            return t;
    return NULL;
}

/* The text of a name, or "". */
static const char *find_text(const message *m, const char *name)
{
    for (const tensor *t = m->tensors; t; t = t->next)
        if (t->text && strcmp(t->name, name) == 0)
            return t->text;
    return "";
}

/* A shape or an index as "[2,3]". */
static const char *listed(int count, const size_t *numbers)
{
    const char *list = "";
    for (int i = 0; i < count; i++)
        list = numbers[i] == ANY ? written("%s,any", list) : written("%s,%zu", list, numbers[i]);
    return written("[%s]", list + (count > 0)); /* without the first comma */
}

/* The argument of a name, which must have this shape. */
static const tensor *argument(const message *m, const char *name, int axes, const size_t *shape)
{
    const tensor *t = find(m, m->prefix, name);
    if (!t)
        fail("%s%s: expected a tensor of this name, got none", m->prefix, name);
    bool fits = t->axes == axes;
    for (int i = 0; fits && i < axes; i++)
        fits = shape[i] == ANY || shape[i] == t->shape[i];
    if (!fits)
        fail("%s: expected the shape %s, got %s", t->name, listed(axes, shape), listed(t->axes, t->shape));
    return t;
}

/* A safetensors file begins with a header in JSON: objects, lists of whole numbers, and strings. `at` is where it is read
   next; it ends with a 0. */
static const char *at;

/* Whether this character comes next. If so, it is read. */
static bool next_is(char wanted)
{
    at += strspn(at, " \t\r\n");
    return *at == wanted ? at++, true : false;
}

static void expect(char wanted)
{
    if (!next_is(wanted))
        fail("header: expected '%c', got '%.20s'", wanted, at);
}

static const char *read_string(void)
{
    expect('"');
    size_t length = 0;
    while (at[length] && at[length] != '"')
        length += at[length] == '\\' && at[length + 1] ? 2 : 1;
    if (!at[length])
        fail("header: a string does not end");
    char *text = allocate(length + 1, 1), *to = text;
    for (const char *end = at + length; at < end; at++) {
        if (*at == '\\' && *++at == 'u') {
            at += strspn(at + 1, "0123456789abcdefABCDEF") < 4 ? 0 : 4;
            *to++ = '?'; /* the names and texts that are used here have no such characters */
        } else {
            *to++ = *at; /* of an escape such as \", what follows the backslash */
        }
    }
    expect('"');
    return text;
}

/* A list of whole numbers, at most so many. Returns how many. */
static int read_numbers(size_t *numbers, int most)
{
    int count = 0;
    expect('[');
    if (next_is(']'))
        return 0;
    do {
        next_is(' ');
        char *end = NULL;
        if (count == most || *at < '0' || *at > '9')
            fail("header: expected a list of at most %d whole numbers, got '%.20s'", most, at);
        numbers[count++] = strtoull(at, &end, 10); /* if it is too large, SIZE_MAX */
        at = end;
    } while (next_is(','));
    expect(']');
    return count;
}

/* Reads what the header says of a tensor, and checks that its data lie within the `size` bytes of `body`. */
static void read_tensor(message *m, const char *name, const char *body, size_t size)
{
    const char *kind = "";
    size_t shape[MOST_AXES], span[2];
    int axes = -1, ends = -1;
    expect('{');
    do {
        const char *key = read_string();
        expect(':');
        if (strcmp(key, "dtype") == 0)
            kind = read_string();
        else if (strcmp(key, "shape") == 0)
            axes = read_numbers(shape, MOST_AXES);
        else if (strcmp(key, "data_offsets") == 0)
            ends = read_numbers(span, 2);
        else
            fail("%s: expected dtype, shape and data_offsets, got %s", name, key);
    } while (next_is(','));
    expect('}');
    if (size_of(kind) == 0 || axes < 0 || ends != 2)
        fail("%s: expected a dtype of F64, F32, I64, I32, U8 or BOOL, a shape, and two data_offsets", name);
    tensor *t = add_tensor(m, name, kind, axes, shape);
    if (span[0] > span[1] || span[1] > size || span[1] - span[0] != t->count * size_of(kind))
        fail("%s: bytes %zu to %zu of %zu do not hold %s of %s", name, span[0], span[1], size, listed(axes, shape), kind);
    t->data = body + span[0];
}

/* A message from the bytes of a safetensors file, which must outlive it. */
static message unpacked(const char *data, size_t size)
{
    message m = {NULL, ""};
    uint64_t length = 0;
    if (size >= 8)
        memcpy(&length, data, 8);
    if (size < 8 || length > size - 8)
        fail("expected a safetensors file, got %zu bytes, which do not hold its header", size);
    const char *body = data + 8 + length;
    at = memcpy(allocate(length + 1, 1), data + 8, length);
    expect('{');
    if (next_is('}'))
        return m;
    do {
        const char *name = read_string();
        expect(':');
        if (strcmp(name, "__metadata__") != 0) {
            read_tensor(&m, name, body, size - 8 - length);
            continue;
        }
        expect('{');
        if (next_is('}'))
            continue;
        do {
            const char *key = read_string();
            expect(':');
            add_text(&m, key, read_string());
        } while (next_is(','));
        expect('}');
    } while (next_is(','));
    expect('}');
    return m;
}

/* Writes a message to standard output: its length, then a safetensors file. Texts must not need escapes. */
static void say(const message *m)
{
    char *texts = "", *tensors = "";
    size_t offset = 0;
    for (const tensor *t = m->tensors; t; t = t->next) {
        if (t->text) {
            texts = written("%s,\"%s\":\"%s\"", texts, t->name, t->text);
            continue;
        }
        size_t end = offset + t->count * size_of(t->kind);
        tensors = written("%s,\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", tensors, t->name,
                          t->kind, listed(t->axes, t->shape), offset, end);
        offset = end;
    }
    const char *header = written("{\"__metadata__\":{%s}%s}", texts + (*texts == ','), tensors);
    uint64_t length = strlen(header), total = 8 + length + offset;
    fwrite(&total, 8, 1, stdout);
    fwrite(&length, 8, 1, stdout);
    fwrite(header, 1, length, stdout);
    for (const tensor *t = m->tensors; t; t = t->next)
        if (!t->text)
            fwrite(t->data, size_of(t->kind), t->count, stdout);
    fflush(stdout);
}

/* ---- Part 3: the table of operations ----------------------------------------------------------------------------- */

#define IN(name) JOINED(name, DTYPE)
#define JOINED(name, dtype) JOIN(name, dtype)
#define JOIN(name, dtype) name##_##dtype

#define REAL double
#define DTYPE float64
#include "port.c"
#undef REAL
#undef DTYPE
#define REAL float
#define DTYPE float32
#include "port.c"

typedef void operation(const message *ask, message *answer);
#define OPERATION(name) {#name, name##_float64, name##_float32}
static const struct {
    const char *name;
    operation *in_float64, *in_float32;
} operations[] = {
    OPERATION(smca_attention),      OPERATION(smca_attention_vjp), OPERATION(multi_scale_smca_attention),
    OPERATION(generalized_box_iou), OPERATION(match_cost),         OPERATION(assign),
};
#define OPERATIONS (sizeof operations / sizeof operations[0])

/* The operation that a message asks for, in the dtype that it asks for, or NULL. */
static operation *asked_for(const message *ask)
{
    const char *name = find_text(ask, "operation"), *dtype = find_text(ask, "dtype");
    for (size_t i = 0; i < OPERATIONS; i++)
        if (strcmp(name, operations[i].name) == 0)
            return strcmp(dtype, "float64") == 0   ? operations[i].in_float64
                   : strcmp(dtype, "float32") == 0 ? operations[i].in_float32
                                                   : NULL;
    return NULL;
}

/* ---- Part 4: questions and answers ------------------------------------------------------------------------------- */

static char *read_bytes(FILE *in, size_t size)
{
    if (size > LARGEST)
        fail("expected at most %zu bytes, got %zu", LARGEST, size);
    char *data = allocate(size, 1);
    if (fread(data, 1, size, in) != size)
        fail("expected %zu bytes, got an end before them", size);
    return data;
}

static message answer_to(const message *ask)
{
    message answer = {NULL, ""};
    operation *compute = asked_for(ask);
    if (compute) {
        compute(ask, &answer);
    } else if (strcmp(find_text(ask, "operation"), "describe") == 0) {
        const char *names = operations[0].name;
        for (size_t i = 1; i < OPERATIONS; i++)
            names = written("%s,%s", names, operations[i].name);
        add_text(&answer, "operations", names);
        add_text(&answer, "dtypes", "float64,float32");
        add_text(&answer, "name", "port.c");
    } else {
        fail("there is no operation %s in %s here", find_text(ask, "operation"), find_text(ask, "dtype"));
    }
    return answer;
}

static int answer_questions(void)
{
    static uint64_t length;
    static bool whole_message; /* otherwise it is unknown where the next one begins */
    size_t got;
    while ((got = fread(&length, 1, 8, stdin)) == 8) {
        whole_message = false;
        if (setjmp(begun) == 0) {
            const char *data = read_bytes(stdin, length);
            whole_message = true;
            message ask = unpacked(data, length), answer = answer_to(&ask);
            say(&answer);
        } else {
            tensor error = {.name = "error", .text = failure};
            say(&(message){&error, ""});
            if (!whole_message) {
                fprintf(stderr, "%s\n", failure);
                return 1;
            }
        }
        free_all();
    }
    if (got > 0)
        fprintf(stderr, "expected 8 bytes with the length of a message, got %zu\n", got);
    return got > 0;
}

/* ---- Part 5: vectors --------------------------------------------------------------------------------------------- */

/* Of assignments that cost the same, any is right. So the answer gets a "total", which is compared in their place. */
static void add_total(const message *file, message *answer)
{
    const tensor *cost = argument(file, "cost", SHAPE(ANY, ANY));
    size_t n = cost->shape[0], m = cost->shape[1], pairs = n < m ? n : m;
    const tensor *rows = argument(answer, "rows", SHAPE(pairs)), *cols = argument(answer, "cols", SHAPE(pairs));
    bool *row_taken = allocate(pairs ? n : 0, 1), *column_taken = allocate(pairs ? m : 0, 1);
    double sum = 0, *total = add_result(answer, "total", "F64", 0, NULL);
    for (size_t i = 0; i < pairs; i++) {
        size_t row = whole(rows, i, 0, (double)n - 1), column = whole(cols, i, 0, (double)m - 1);
        if (row_taken[row] || column_taken[column])
            fail("rows and cols: expected each row and column once at most, got one twice");
        row_taken[row] = column_taken[column] = true;
        sum += value(cost, row * m + column);
    }
    *total = sum;
}

static bool is_near(double got, double expected, double bound)
{
    return got == expected || fabs(got - expected) <= bound;
}

static void print_difference(const char *where, double got, double expected, double bound)
{
    printf("%s: got %.17g, expected %.17g, bound %.3g\n", where, got, expected, bound);
}

/* Whether a result is as expected, entry by entry. The first entry that is not is printed. */
static bool result_agrees(const char *path, const message *file, const message *answer, const tensor *expected)
{
    const char *name = expected->name + strlen("out.");
    const tensor *got = argument(answer, name, expected->axes, expected->shape);
    const tensor *bound = argument(&(message){file->tensors, "bound."}, name, expected->axes, expected->shape);
    size_t i = 0, index[MOST_AXES];
    while (i < expected->count && is_near(value(got, i), value(expected, i), value(bound, i)))
        i++;
    if (i == expected->count)
        return true;
    for (size_t axis = (size_t)expected->axes, rest = i; axis-- > 0; rest /= expected->shape[axis])
        index[axis] = rest % expected->shape[axis];
    print_difference(written("%s: %s%s", path, name, listed(expected->axes, index)), value(got, i), value(expected, i),
                     value(bound, i));
    return false;
}

/* Whether the gradients are as expected along a direction: the sum of gradient times "along.0.NAME" over all results,
   against the number "along.0". */
static bool direction_agrees(const char *path, const message *file, const message *answer, const tensor *expected)
{
    double sum = 0;
    const char *parts = written("%s.", expected->name);
    for (const tensor *t = file->tensors; t; t = t->next) {
        if (t->text || strncmp(t->name, parts, strlen(parts)) != 0)
            continue;
        const tensor *got = argument(answer, t->name + strlen(parts), t->axes, t->shape);
        for (size_t i = 0; i < t->count; i++)
            sum += value(got, i) * value(t, i);
    }
    const message bounds = {file->tensors, "along_bound."};
    double bound = value(argument(&bounds, expected->name + strlen("along."), 0, NULL), 0);
    bool agrees = is_near(sum, value(expected, 0), bound);
    if (!agrees)
        print_difference(written("%s: %s", path, expected->name), sum, value(expected, 0), bound);
    return agrees;
}

/* Whether all is as the file expects. */
static bool agrees(const char *path, const message *file, const message *answer)
{
    bool compared = false;
    for (const tensor *t = file->tensors; t; t = t->next) {
        if (t->text)
            continue;
        bool is_result = strncmp(t->name, "out.", 4) == 0;
        bool is_direction = strncmp(t->name, "along.", 6) == 0 && !strchr(t->name + 6, '.') && t->axes == 0;
        if ((is_result && !result_agrees(path, file, answer, t)) ||
            (is_direction && !direction_agrees(path, file, answer, t)))
            return false;
        compared = compared || is_result || is_direction;
    }
    if (!compared)
        fail("expected tensors out.NAME or along.NUMBER with what is expected, got none");
    return true;
}

typedef enum { PASSED, FAILED, SKIPPED } verdict;

static verdict check(const char *path, FILE *in)
{
    long size = fseek(in, 0, SEEK_END) == 0 ? ftell(in) : -1;
    if (size < 0)
        fail("it cannot be read");
    rewind(in);
    message file = unpacked(read_bytes(in, (size_t)size), (size_t)size), answer = {NULL, ""};
    file.prefix = "in.";
    if (!*find_text(&file, "operation") || !*find_text(&file, "dtype"))
        fail("expected texts named operation and dtype, got none");
    operation *compute = asked_for(&file);
    if (!compute)
        return SKIPPED;
    compute(&file, &answer);
    if (strcmp(find_text(&file, "operation"), "assign") == 0)
        add_total(&file, &answer);
    return agrees(path, &file, &answer) ? PASSED : FAILED;
}

int main(int count, char **paths)
{
    static size_t verdicts[3];
    static int i; /* static: it keeps its value when `fail` comes back here */
    if (count < 2)
        return answer_questions();
    for (i = 1; i < count; i++) {
        FILE *in = fopen(paths[i], "rb");
        if (!in) {
            perror(paths[i]);
            verdicts[FAILED]++;
            continue;
        }
        if (setjmp(begun) == 0) {
            verdicts[check(paths[i], in)]++;
        } else {
            fprintf(stderr, "%s: %s\n", paths[i], failure);
            verdicts[FAILED]++;
        }
        fclose(in);
        free_all();
    }
    printf("%zu vectors passed, %zu failed, %zu skipped\n", verdicts[PASSED], verdicts[FAILED], verdicts[SKIPPED]);
    return verdicts[FAILED] > 0;
}

#endif

// The assignment problems of a training step, one block for each (docs/method.md §5): shortest augmenting paths with dual
// prices, after Crouse 2016, "On implementing 2D rectangular assignment algorithms". `reference/matching.py` writes the
// same algorithm out for one problem, with its steps 1 to 4, which the comments below name.
//
// Rows are what must all be assigned, columns what they choose from: rows = valid targets and columns = queries, or the
// reverse ("flipped") where there are more valid targets than queries. Thread k owns the columns k, k + blockDim.x, …:
// their price, distance and state are read and written by no other thread, so that a step of Dijkstra's algorithm has one
// barrier only, that of its reduction.
//
// With -DSMCA_HOST a C++20 compiler builds the same text for the CPU, with one thread per thread of the block, so that the
// algorithm and its barriers can be tested where there is no GPU.

#ifdef SMCA_HOST
#include <barrier>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
#define __restrict__ __restrict

static thread_local struct { int x; } threadIdx, blockIdx;
static struct { int x; } blockDim;
static int warpSize;
static double* shared;
static std::barrier<>* everyone;
static void __syncthreads() { everyone->arrive_and_wait(); }

// All warps of the emulated block shuffle together, so the barrier of the block serves as theirs.
template <typename Value>
static Value __shfl_xor_sync(unsigned, Value value, int mask) {
    static Value slots[1024];
    slots[threadIdx.x] = value;
    __syncthreads();
    const Value other = slots[threadIdx.x ^ mask];
    __syncthreads();
    return other;
}
#else
extern __shared__ double shared[];
#endif

namespace {

// Larger than the length of any path: sums of float32 numbers stay far below it. (NVRTC has no INFINITY.)
constexpr double FAR = 1e300;
constexpr int FREE = -1;
constexpr int MAX_WARPS = 32;
enum State : unsigned char { OPEN, SETTLED, PADDING };

struct Nearest {
    double distance;
    int column;
};

// The lower index wins a tie, so that the result depends neither on the order of the threads nor on their number.
__device__ Nearest nearer(const Nearest a, const Nearest b) {
    return b.distance < a.distance || (b.distance == a.distance && b.column < a.column) ? b : a;
}

// The least over the block, in every thread. `turn` alternates between 0 and 1 from call to call: a slow thread may still
// read one call's results while a fast one writes the next call's, and the barrier of that one keeps it from going further.
__device__ Nearest nearest_of_block(Nearest mine, const int turn) {
    __shared__ Nearest of_warp[2][MAX_WARPS];
    for (int mask = warpSize / 2; mask > 0; mask /= 2) {
        const double distance = __shfl_xor_sync(0xffffffffu, mine.distance, mask);
        const int column = __shfl_xor_sync(0xffffffffu, mine.column, mask);
        mine = nearer(mine, {distance, column});
    }
    if (threadIdx.x % warpSize == 0) of_warp[turn][threadIdx.x / warpSize] = mine;
    __syncthreads();
    Nearest best = of_warp[turn][0];
    for (int warp = 1; warp < int(blockDim.x) / warpSize; ++warp) best = nearer(best, of_warp[turn][warp]);
    return best;
}

}  // namespace

// Block p solves problem p: layer p / batch, image p % batch.
//   costs   [problems, queries, targets]. valid: [batch, targets], 0 or 1.
//   query   [problems, targets], out: of each target, or -1.
//   status  [problems], out: -1, or the flat index in [queries, targets] of the first valid cost that is not finite.
// blockDim.x is a multiple of warpSize. Dynamic shared memory: 38 bytes × max(queries, targets).
extern "C" __global__ void assign(const float* __restrict__ costs, const unsigned char* __restrict__ valid,
                                  long long* __restrict__ query, long long* __restrict__ status, const int batch,
                                  const int queries, const int targets) {
    const long long problem = blockIdx.x;
    const float* cost = costs + problem * queries * targets;
    const unsigned char* valid_here = valid + problem % batch * targets;
    long long* query_here = query + problem * targets;
    const int first = threadIdx.x, step = blockDim.x;

    const int size = queries > targets ? queries : targets;
    double* price_row = shared;                                  // u of step 1
    double* price_column = price_row + size;                     // v of step 1
    double* distance = price_column + size;                      // of the shortest path found to a column
    int* came_from = reinterpret_cast<int*>(distance + size);    // the last row on that path
    int* row_of_column = came_from + size;
    int* column_of_row = row_of_column + size;
    State* state = reinterpret_cast<State*>(column_of_row + size);
    unsigned char* is_target = reinterpret_cast<unsigned char*>(state + size);

    for (int k = first; k < size; k += step) {
        price_row[k] = price_column[k] = 0.0;
        row_of_column[k] = column_of_row[k] = FREE;
        is_target[k] = k < targets && valid_here[k];
    }
    __syncthreads();

    Nearest bad = {FAR, 0};
    for (int k = first; k < queries * targets; k += step) {
        // x − x is 0 for a finite x, NaN for an infinite one and for NaN.
        if (is_target[k % targets] && cost[k] - cost[k] != 0.0f) {
            bad = {double(k), 0};
            break;
        }
    }
    int turn = 0;
    bad = nearest_of_block(bad, turn);
    const bool all_finite = bad.distance == FAR;
    if (first == 0) status[problem] = all_finite ? -1 : static_cast<long long>(bad.distance);
    if (!all_finite) {
        for (int t = first; t < targets; t += step) query_here[t] = -1;
        return;
    }

    int count = 0;
    for (int t = 0; t < targets; ++t) count += is_target[t];
    const bool flipped = count > queries;
    const int rows = flipped ? queries : targets, columns = flipped ? targets : queries;
    const int row_stride = flipped ? targets : 1, column_stride = flipped ? 1 : targets;

    for (int new_row = 0; new_row < rows; ++new_row) {
        if (!flipped && !is_target[new_row]) continue;
        for (int j = first; j < columns; j += step) {
            distance[j] = FAR;
            state[j] = flipped && !is_target[j] ? PADDING : OPEN;
        }
        // Step 2: Dijkstra's algorithm over the columns, from the new row to the nearest free column.
        int row = new_row;
        Nearest nearest = {0.0, FREE};
        while (row != FREE) {
            Nearest mine = {FAR, columns};
            for (int j = first; j < columns; j += step) {
                if (state[j] != OPEN) continue;
                const double length = cost[row * row_stride + j * column_stride] - price_row[row] - price_column[j];
                if (nearest.distance + length < distance[j]) {
                    distance[j] = nearest.distance + length;
                    came_from[j] = row;
                }
                mine = nearer(mine, {distance[j], j});
            }
            turn = 1 - turn;
            nearest = nearest_of_block(mine, turn);
            row = row_of_column[nearest.column];
            if (row != FREE && nearest.column % step == first) state[nearest.column] = SETTLED;
        }
        // Step 3: a settled column has its row to itself, so no two threads meet at one price.
        for (int j = first; j < columns; j += step) {
            if (state[j] != SETTLED) continue;
            price_row[row_of_column[j]] += nearest.distance - distance[j];
            price_column[j] -= nearest.distance - distance[j];
        }
        if (first == 0) price_row[new_row] += nearest.distance;
        __syncthreads();  // row_of_column has been read
        // Step 4: as long as the path, and that is short: one thread does it.
        if (first == 0) {
            for (int column = nearest.column, from = FREE; from != new_row;) {
                from = came_from[column];
                row_of_column[column] = from;
                const int left = column_of_row[from];
                column_of_row[from] = column;
                column = left;
            }
        }
        __syncthreads();  // prices and pairs are in place for the next row
    }
    for (int t = first; t < targets; t += step) {
        query_here[t] = flipped ? row_of_column[t] : column_of_row[t];
    }
}

#ifdef SMCA_HOST
// The launch: `problems` blocks of `threads` threads in warps of `warp`, one block after the other.
extern "C" void assign_on_host(const float* costs, const unsigned char* valid, long long* query, long long* status,
                               int problems, int batch, int queries, int targets, int threads, int warp, int shared_bytes) {
    std::vector<char> memory(shared_bytes + sizeof(double));
    std::barrier<> barrier(threads);
    shared = reinterpret_cast<double*>(memory.data()), everyone = &barrier, blockDim.x = threads, warpSize = warp;
    const auto run = [=](int thread) {
        threadIdx.x = thread;
        for (blockIdx.x = 0; blockIdx.x < problems; ++blockIdx.x, __syncthreads())
            assign(costs, valid, query, status, batch, queries, targets);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
}
#endif

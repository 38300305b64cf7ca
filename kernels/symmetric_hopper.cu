// Symmetric products on Hopper: alpha L R^T + beta A, which the caller knows is symmetric.
//
// Compiled by NVRTC without headers, with ELEMENT (f16 or bf16), TRANSPOSED (0: what is summed lies next to each
// other; 1: rows do) and ADDED (whether there is an A) defined; symmetric_hopper.py starts it.
//
// A block, one on each multiprocessor, takes parts of results one after another: a panel s of 128 rows of L against two
// panels of R, o1 and o2, so 128 x 256 in all (symmetric_schedule.py says which). One warp fetches: three stages of 64
// summed columns are on their way, also over the end of a part. Two warpgroups multiply, 64 rows each. Two warps store
// what these leave in shared memory, in squares of 64 x 64, each with its mirror, while the next part is multiplied.
// All buffers are swizzled by 128 bytes.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  char bytes[128];
};

constexpr u32 NUM_STAGES = 3;
constexpr u32 SQUARE = 64 * 64 * 2;  // bytes: 64 rows of 128
constexpr u32 PANEL = 2 * SQUARE;    // 128 rows, 64 summed columns
constexpr u32 STAGE = 3 * PANEL;     // s, o1, o2
constexpr u32 RESULT = 4 * SQUARE;   // 64 rows of one warpgroup, 256 columns
constexpr u32 RESULTS_AT = NUM_STAGES * STAGE;
constexpr u32 MIRRORS_AT = RESULTS_AT + 2 * RESULT;
constexpr u32 BARRIERS_AT = MIRRORS_AT + 2 * SQUARE;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// --- barriers ---------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra PASSED;\n"
      "bra AGAIN;\n"
      "PASSED:\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// --- copies -----------------------------------------------------------------------------------

__device__ __forceinline__ void fetch(const TensorMap* map, u32 to, u32 barrier, int x, int y, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(matrix)
      : "memory");
}

__device__ __forceinline__ void put(const TensorMap* map, u32 from, int x, int y, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from), "r"(x),
      "r"(y), "r"(matrix)
      : "memory");
}

__device__ __forceinline__ void commit_puts() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_for_puts() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// A panel of an operand: 128 rows by 64 summed columns.
__device__ __forceinline__ void fetch_panel(const TensorMap* map, u32 to, u32 barrier, int k, int panel, int matrix) {
  for (int half = 0; half < 2; half++) {
    const int row = 128 * panel + 64 * half;
    fetch(map, to + half * SQUARE, barrier, TRANSPOSED ? row : k, TRANSPOSED ? k : row, matrix);
  }
}

// --- products ---------------------------------------------------------------------------------

// What wgmma reads of an operand that begins at `address`: 8 rows (of a transposed one 8 summed columns) lie 1,024
// bytes from the next 8; the next 64 rows of a transposed one lie a square further.
__device__ __forceinline__ u64 operand_at(u32 address) {
  constexpr u64 lead = TRANSPOSED ? SQUARE >> 4 : 1;
  return (u64)((address & 0x3FFFF) >> 4) | (lead << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}

// From one 16 summed columns to the next, as `operand_at` counts.
constexpr u64 NEXT_16 = (TRANSPOSED ? 16 * 128 : 16 * 2) >> 4;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define SUMS8(i) \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS32(i) SUMS8(i), SUMS8(i + 8), SUMS8(i + 16), SUMS8(i + 24)

// sums of 64 x 256 += 64 x 16 times (256 x 16)^T; without `add`, they start from these.
__device__ __forceinline__ void multiply(float (&sums)[128], u64 left, u64 right, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TEXT(ELEMENT) "." TEXT(ELEMENT) " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, " TEXT(TRANSPOSED) ", " TEXT(TRANSPOSED) ";\n}"
      : SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96)
      : "l"(left), "l"(right), "r"(add));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// --- results ----------------------------------------------------------------------------------

__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 pair;
  asm("cvt.rn." TEXT(ELEMENT) "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ void widen(u32 pair, float& low, float& high) {
  asm("{\n.reg .b16 first, second;\n"
      "mov.b32 {first, second}, %2;\n"
      "cvt.f32." TEXT(ELEMENT) " %0, first;\n"
      "cvt.f32." TEXT(ELEMENT) " %1, second;\n}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

__device__ __forceinline__ void read_squares(u32 (&pairs)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void write_squares(u32 address, const u32 (&pairs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(pairs[0]),
               "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}

__device__ __forceinline__ void read_squares_mirrored(u32 (&pairs)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(address)
               : "memory");
}

// Of 16 bytes `chunk` of a row of 128 bytes, in the order that TMA gives them.
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The upper triangle of a square on the diagonal becomes the lower one's mirror, by one warp.
__device__ __forceinline__ void mirror_within(u32 square, u32 lane) {
  const u32 which = lane / 8, within = lane % 8;  // of four 8 x 8 squares, this lane's address
  for (u32 four = 0; four < 7; four++) {         // the 28 below the diagonal
    u32 across = 4 * four + which, down = 1;
    while (across >= down) across -= down++;
    u32 pairs[4];
    read_squares_mirrored(pairs, square + swizzled(8 * down + within, across));
    write_squares(square + swizzled(8 * across + within, down), pairs);
  }
  const u32 row = lane / 4, column = lane % 4 * 2;  // of a square, what this lane holds
  for (u32 four = 0; four < 2; four++) {
    const u32 place = 4 * four + which, address = square + swizzled(8 * place + within, place);
    u32 pairs[4], mirrored[4];
    read_squares(pairs, address);
    read_squares_mirrored(mirrored, address);
#pragma unroll
    for (u32 one = 0; one < 4; one++) {
      const u32 low = (row >= column ? pairs[one] : mirrored[one]) & 0xFFFF;
      const u32 high = (row > column ? pairs[one] : mirrored[one]) & 0xFFFF0000;
      pairs[one] = low | high;
    }
    write_squares(address, pairs);
  }
}

// A square's mirror into another one, by one warp.
__device__ __forceinline__ void mirror_into(u32 mirror, u32 square, u32 lane) {
  const u32 which = lane / 8, within = lane % 8;  // of four 8 x 8 squares, this lane's address
  for (u32 strip = 0; strip < 4; strip++) {
    const u32 across = 2 * strip + which / 2;
    u32 pairs[4][4];
#pragma unroll
    for (u32 four = 0; four < 4; four++) {
      read_squares_mirrored(pairs[four], square + swizzled(8 * (2 * four + (which & 1)) + within, across));
    }
#pragma unroll
    for (u32 four = 0; four < 4; four++) {
      write_squares(mirror + swizzled(8 * across + within, 2 * four + (which & 1)), pairs[four]);
    }
  }
}

// --- the three kinds of workers ---------------------------------------------------------------

// Tiles {s, o1} and {s, o2} of a matrix; of the same o twice, one tile.
struct Part {
  int matrix, s, o1, o2;
};

__device__ __forceinline__ Part part_of(const int4* parts, int index) {
  const int4 part = parts[index];
  return {part.x, part.y, part.z, part.w};
}

// full, empty: a stage. added: what is added lies where results go; done: results do; stored: they are. These for each
// warpgroup.
struct Barriers {
  u32 full, empty, added, done, stored;
};

struct Ring {
  u32 stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == NUM_STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void fetch_added(
    const TensorMap* added, u32 results, const Barriers& barriers, u32 parity, const Part& part) {
  for (u32 warpgroup = 0; warpgroup < 2; warpgroup++) {
    const u32 barrier = barriers.added + 8 * warpgroup;
    barrier_wait(barriers.stored + 8 * warpgroup, parity ^ 1);
    barrier_expect(barrier, RESULT);
    for (int square = 0; square < 4; square++) {
      const int column = 128 * (square < 2 ? part.o1 : part.o2) + 64 * (square & 1);
      const u32 to = results + warpgroup * RESULT + square * SQUARE;
      fetch(added, to, barrier, column, 128 * part.s + 64 * warpgroup, part.matrix);
    }
  }
}

__device__ __forceinline__ void produce(
    const TensorMap* left, const TensorMap* right, const TensorMap* added, const int4* parts, int num_parts,
    int num_steps, u32 memory, const Barriers& barriers) {
  // Late enough that results of the part before are stored, early enough to be there after the last step.
  const int added_step = max(0, num_steps - 6);
  Ring ring;
  u32 parity = 0;
  for (int index = blockIdx.x; index < num_parts; index += gridDim.x) {
    const Part part = part_of(parts, index);
    for (int step = 0; step < num_steps; step++) {
      const u32 barrier = barriers.full + 8 * ring.stage, stage = memory + ring.stage * STAGE;
      barrier_wait(barriers.empty + 8 * ring.stage, ring.parity ^ 1);
      barrier_expect(barrier, STAGE);
      fetch_panel(left, stage, barrier, 64 * step, part.s, part.matrix);
      fetch_panel(right, stage + PANEL, barrier, 64 * step, part.o1, part.matrix);
      fetch_panel(right, stage + 2 * PANEL, barrier, 64 * step, part.o2, part.matrix);
      ring.next();
      if (ADDED && step == added_step) {
        fetch_added(added, memory + RESULTS_AT, barriers, parity, part);
        parity ^= 1;
      }
    }
  }
  // The next kernel's blocks may be set up. Earlier, they would take the place of other streams' kernels.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// One warpgroup's sums, and what is added, to where its results lie: four squares side by side.
__device__ __forceinline__ void write_results(const float (&sums)[128], u32 results, float alpha, float beta) {
  const u32 warp = threadIdx.x % 128 / 32, which = threadIdx.x % 32 / 8, within = threadIdx.x % 8;
#pragma unroll
  for (int square = 0; square < 4; square++) {
    u32 address[4], added[4][4];  // of 16 x 16 of a warp's 16 x 64
#pragma unroll
    for (int four = 0; four < 4; four++) {
      address[four] = results + square * SQUARE + swizzled(16 * warp + 8 * (which & 1) + within, 2 * four + which / 2);
      if (ADDED) read_squares(added[four], address[four]);
    }
#pragma unroll
    for (int four = 0; four < 4; four++) {
      u32 pairs[4];
#pragma unroll
      for (int one = 0; one < 4; one++) {
        const int at = 32 * square + 8 * four + 2 * one;
        float low = 0, high = 0;
        if (ADDED) widen(added[four][one], low, high);
        pairs[one] = ADDED ? narrow(alpha * sums[at] + beta * low, alpha * sums[at + 1] + beta * high)
                           : narrow(alpha * sums[at], alpha * sums[at + 1]);
      }
      write_squares(address[four], pairs);
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Multiplies, and leaves results of one warpgroup in shared memory.
__device__ __forceinline__ void consume(
    int num_parts, int num_steps, float alpha, float beta, u32 memory, const Barriers& barriers, u32 warpgroup) {
  const bool signals = threadIdx.x % 128 == 0;
  const u32 added = barriers.added + 8 * warpgroup, stored = barriers.stored + 8 * warpgroup;
  Ring ring;
  u32 parity = 0;
  float sums[128] = {};  // the compilers of CUDA 12.6 and 12.8 wait for each product of what is not set
  for (int index = blockIdx.x; index < num_parts; index += gridDim.x) {
    u32 before = 0;
    for (int step = 0; step < num_steps; step++) {
      const u32 stage = memory + ring.stage * STAGE;
      const u64 left = operand_at(stage + warpgroup * SQUARE), right = operand_at(stage + PANEL);
      barrier_wait(barriers.full + 8 * ring.stage, ring.parity);
      products_begin();
#pragma unroll
      for (int sixteen = 0; sixteen < 4; sixteen++) {
        multiply(sums, left + sixteen * NEXT_16, right + sixteen * NEXT_16, step + sixteen);
      }
      products_commit();
      products_wait<1>();
      if (step && signals) barrier_arrive(before);
      before = barriers.empty + 8 * ring.stage;
      ring.next();
    }
    products_wait<0>();
    if (signals) barrier_arrive(before);
    barrier_wait(ADDED ? added : stored, ADDED ? parity : parity ^ 1);
    parity ^= 1;
    write_results(sums, memory + RESULTS_AT + warpgroup * RESULT, alpha, beta);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barriers.done + 8 * warpgroup);
  }
}

// Stores results of one warpgroup, and their mirrors, while it goes on: one warp.
__device__ __forceinline__ void store(
    const TensorMap* out, const int4* parts, int num_parts, u32 memory, const Barriers& barriers, u32 warpgroup) {
  const u32 lane = threadIdx.x % 32;
  const u32 results = memory + RESULTS_AT + warpgroup * RESULT, mirror = memory + MIRRORS_AT + warpgroup * SQUARE;
  u32 parity = 0;
  for (int index = blockIdx.x; index < num_parts; index += gridDim.x) {
    const Part part = part_of(parts, index);
    const int row = 2 * part.s + warpgroup, num_squares = part.o1 == part.o2 ? 2 : 4;
    barrier_wait(barriers.done + 8 * warpgroup, parity);
    parity ^= 1;
    for (int square = 0; square < num_squares; square++) {
      const int o = square < 2 ? part.o1 : part.o2, column = 2 * o + (square & 1);
      const u32 direct = results + square * SQUARE;
      if (part.s == o && column > row) continue;  // of a tile on the diagonal the lower half decides
      if (row == column) {
        mirror_within(direct, lane);
      } else {
        if (lane == 0) {
          put(out, direct, 64 * column, 64 * row, part.matrix);
          wait_for_puts();  // of the mirror before: this one is not committed yet
        }
        __syncwarp();
        mirror_into(mirror, direct, lane);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0) {
        put(out, row == column ? direct : mirror, 64 * row, 64 * column, part.matrix);
        commit_puts();
      }
    }
    if (lane == 0) {
      wait_for_puts();
      barrier_arrive(barriers.stored + 8 * warpgroup);
    }
    __syncwarp();
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) symmetric_product(
    const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
    const __grid_constant__ TensorMap added, const __grid_constant__ TensorMap out, const int4* parts, int num_parts,
    int num_steps, float alpha, float beta) {
  extern __shared__ char raw[];
  const u32 memory = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = memory + BARRIERS_AT, empty = full + 8 * NUM_STAGES, added_at = empty + 8 * NUM_STAGES;
  const Barriers barriers = {full, empty, added_at, added_at + 16, added_at + 32};
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < NUM_STAGES; stage++) {
      barrier_init(barriers.full + 8 * stage, 1);
      barrier_init(barriers.empty + 8 * stage, 2);  // by one thread of each warpgroup
    }
    for (u32 warpgroup = 0; warpgroup < 2; warpgroup++) {
      barrier_init(barriers.added + 8 * warpgroup, 1);
      barrier_init(barriers.done + 8 * warpgroup, 4);  // by one thread of each warp
      barrier_init(barriers.stored + 8 * warpgroup, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");  // all that was started before is done
  // Sums are 128 registers of a thread that multiplies; the others make room.
  const u32 warp = threadIdx.x / 32;
  if (warp < 8) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    consume(num_parts, num_steps, alpha, beta, memory, barriers, warp / 4);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (threadIdx.x == 8 * 32) {
      produce(&left, &right, &added, parts, num_parts, num_steps, memory, barriers);
    } else if (warp == 9 || warp == 10) {
      store(&out, parts, num_parts, memory, barriers, warp - 9);
    }
  }
}

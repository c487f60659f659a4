// The emulated copy engine and the emulated tensor cores.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "emulation_state.h"

namespace fastattn::cuda::emulated {

namespace {

// Exchanges 16-byte pieces within 8 rows: bits 4 to 6 (of 64-byte rows 4 and 5) of an address change by those
// above bit 7.
uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = swizzle == Swizzle::k128Bytes ? 7 : 3;
  return address ^ (address >> 7 & mask) << 4;
}

float value_of(uint16_t bits, Elements elements) {
  return elements == Elements::kBFloat16 ? to_float(BFloat16{bits}) : from_float16(bits);
}

}  // namespace

// --- Copies
// --------------------------------------------------------------------------------------------------

void copy(uint32_t address, const TensorMap& map, const Coordinates& from, uint32_t barrier, int rank) {
  BlockState& state = block();
  state.maybe_yield();
  Copy made;
  std::memcpy(static_cast<void*>(&made.map), &map, sizeof(made.map));
  made.from = from;
  made.address = address;
  made.barrier = barrier;
  const TensorMapSpec& spec = made.map;
  const uint32_t row_bytes = swizzle_bytes(spec.swizzle);
  if (spec.rank != rank) state.fail("a copy and its tensor map differ in rank");
  if (2 * spec.box[0] != row_bytes) state.fail("a box is not as wide as its swizzle");
  if (address % (8 * row_bytes) != 0)
    state.fail("a copy's rows do not start where the swizzle's pattern does");
  uint64_t bytes = 2;
  for (int d = 0; d < rank; ++d) bytes *= spec.box[d];
  if (address + bytes > state.memory.size()) state.fail("a copy ends outside shared memory");
  std::fill_n(state.memory.begin() + address, bytes, 0xFF);  // NaN in both 16-bit types
  std::fill_n(state.contents.begin() + address, bytes, Contents::kUnderWay);
  state.barrier_at(barrier);
  state.copies.push_back(made);
}

bool BlockState::complete_copy() {
  if (copies.empty()) return false;
  const size_t index = random() % copies.size();
  const Copy done = copies[index];
  copies.erase(copies.begin() + index);
  const TensorMapSpec& spec = done.map;
  const uint32_t row_bytes = swizzle_bytes(spec.swizzle);
  uint64_t rows = 1;
  for (int d = 1; d < spec.rank; ++d) rows *= spec.box[d];
  for (uint64_t row = 0; row < rows; ++row) {
    bool inside = true;
    const char* source = static_cast<const char*>(spec.address);
    uint64_t rest = row;
    for (int d = 1; d < spec.rank; ++d) {
      const int64_t at = done.from.at[d] + static_cast<int64_t>(rest % spec.box[d]);
      rest /= spec.box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(spec.size[d]);
      source += at * static_cast<int64_t>(spec.stride[d - 1]);
    }
    for (uint32_t c = 0; c < spec.box[0]; ++c) {
      const int64_t column = done.from.at[0] + static_cast<int64_t>(c);
      uint16_t value = 0;
      if (inside && column >= 0 && column < static_cast<int64_t>(spec.size[0]))
        std::memcpy(&value, source + 2 * column, 2);
      uint32_t to = static_cast<uint32_t>(done.address + row * row_bytes + 2 * c);
      if (options.fault != Fault::kWrongSwizzle) to = swizzled(to, spec.swizzle);
      std::memcpy(&memory[to], &value, 2);
      contents[to] = Contents::kThere;
    }
  }
  MemoryBarrier& barrier = barriers.at(done.barrier);
  barrier.bytes -= static_cast<int64_t>(rows * row_bytes);
  settle(barrier);
  return true;
}

void BlockState::complete_something() {
  Warpgroup& group = warpgroups[random() % warpgroups.size()];
  if (group.pending.empty() || random() % 2 == 0) {
    complete_copy();
  } else {
    complete_group(group);
  }
}

// --- Products
// ------------------------------------------------------------------------------------------------

bool BlockState::meet(const char* kind) {
  Warpgroup& group = warpgroups[running / 128];
  if (group.arrived == 0) group.kind = kind;
  if (std::strcmp(group.kind, kind) != 0)
    fail(std::string("the warpgroup's threads meet in different instructions: ") + kind + " and " +
         group.kind);
  const uint64_t generation = group.generation;
  if (++group.arrived == 128) return true;
  group.waiters.push_back(running);
  while (group.generation == generation) sleep(std::string("its warpgroup at ") + kind);
  return false;
}

void BlockState::part() {
  Warpgroup& group = warpgroups[running / 128];
  group.arrived = 0;
  ++group.generation;
  wake(group.waiters);
}

void issue(const Product& product) {
  BlockState& state = block();
  Warpgroup& group = state.warpgroups[state.running / 128];
  if (!group.may_write) state.fail("a product is issued without products_begin since the last wait");
  group.issued[state.running % 128].push_back(product);
}

void products_begin() {
  BlockState& state = block();
  if (!state.meet("products_begin")) return;
  state.warpgroups[state.running / 128].may_write = true;
  state.part();
}

namespace {

// Where element (row, column) of the accumulators is: of which thread, and at which of its registers.
struct Place {
  int thread, element;
};
Place accumulator(int row, int column) {
  return {row / 16 * 32 + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row % 16 / 8 * 2 + column % 2};
}

Sums* sums_of(Warpgroup& group, const GroupProduct& product, float* const (&registers)[128]) {
  for (const auto& sums : group.sums)
    if (sums->registers[0] == registers[0]) return sums.get();
  auto made = std::make_unique<Sums>();
  made->columns = product.common.columns;
  made->values.resize(64 * made->columns);
  std::copy_n(registers, 128, made->registers);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < made->columns; ++column) {
      const Place at = accumulator(row, column);
      float& value = registers[at.thread][at.element];
      made->values[row * made->columns + column] = value;
      value = NAN;
    }
  }
  group.sums.push_back(std::move(made));
  return group.sums.back().get();
}

}  // namespace

void products_commit() {
  BlockState& state = block();
  if (!state.meet("products_commit")) return;
  Warpgroup& group = state.warpgroups[state.running / 128];
  std::vector<GroupProduct> products(group.issued[0].size());
  ++group.committed;
  for (size_t n = 0; n < products.size(); ++n) {
    float* registers[128];
    products[n].common = group.issued[0][n];
    for (int thread = 0; thread < 128; ++thread) {
      if (group.issued[thread].size() != products.size())
        state.fail("a warpgroup's threads issued different products");
      const Product& own = group.issued[thread][n];
      if (own.a != products[n].common.a || own.b != products[n].common.b ||
          own.columns != products[n].common.columns)
        state.fail("a warpgroup's threads issued a product with different descriptors");
      products[n].a_fragments[thread] = own.a_fragment;
      registers[thread] = own.d;
    }
    products[n].sums = sums_of(group, products[n], registers);
    products[n].sums->last_group = group.committed;
  }
  for (auto& issued : group.issued) issued.clear();
  group.pending.push_back(std::move(products));
  if (state.random() % 2 == 0) {  // as early as can be, with all that was committed before
    while (!group.pending.empty()) state.complete_group(group);
  }
  state.part();
}

namespace {

struct Descriptor {
  uint32_t start, leading, stride;
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4),
        swizzle(static_cast<Swizzle>(bits >> 62)) {}
};

// Where element (line, k) of an operand is. Lines along k (K-major) come in groups of eight, `stride` apart;
// of a matrix with a row for each k (MN-major) the rows do, in blocks of a swizzled row's width, `leading`
// apart.
uint32_t place_of(const BlockState& state, const Descriptor& d, bool k_major, int line, int k) {
  const uint32_t row_bytes = swizzle_bytes(d.swizzle), width = row_bytes / 2;
  const uint32_t stride = state.options.fault == Fault::kWrongStride ? 2 * d.stride : d.stride;
  const uint32_t offset =
      k_major ? line / 8 * stride + line % 8 * row_bytes + 2 * k
              : line / width * d.leading + 2 * (line % width) + k / 8 * stride + k % 8 * row_bytes;
  return swizzled(d.start + offset, d.swizzle);
}

float element_at(BlockState& state, uint32_t at, Elements elements, const char* operand, bool must_be_there) {
  if (at + 2 > state.memory.size()) {
    state.complain(std::string("a product reads ") + operand + " outside shared memory");
    return NAN;
  }
  const Contents contents = state.contents[at];
  if (contents == Contents::kUnderWay || (must_be_there && contents == Contents::kNothing))
    state.complain(std::string("a product reads ") + operand + " that no copy has brought yet");
  uint16_t bits;
  std::memcpy(&bits, &state.memory[at], 2);
  return value_of(bits, elements);
}

// Element (row, k) of A in the threads' fragments.
float fragment_at(const GroupProduct& product, int row, int k) {
  const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
  const uint32_t pair = product.a_fragments[thread][k / 8 * 2 + row % 16 / 8];
  return value_of(static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16), product.common.elements);
}

}  // namespace

void BlockState::complete_group(Warpgroup& group) {
  for (const GroupProduct& product : group.pending.front()) {
    const Product& common = product.common;
    const int columns = common.columns;
    const bool in_registers = common.a_fragment != nullptr;
    const Descriptor a(common.a), b(common.b);
    std::vector<float> left(64 * 16), right(16 * columns);
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64; ++row)
        left[row * 16 + k] = in_registers ? fragment_at(product, row, k)
                                          // packed rows may be fewer than a tile has
                                          : element_at(*this, place_of(*this, a, true, row, k),
                                                       common.elements, "rows of A", false);
      for (int column = 0; column < columns; ++column)
        right[k * columns + column] = element_at(*this, place_of(*this, b, !in_registers, column, k),
                                                 common.elements, "rows of B", true);
    }
    for (int row = 0; row < 64; ++row) {
      float* sums = &product.sums->values[row * columns];
      if (!common.accumulate) std::fill_n(sums, columns, 0.f);
      for (int k = 0; k < 16; ++k) {
        const float x = left[row * 16 + k];
        const float* y = &right[k * columns];
        for (int column = 0; column < columns; ++column) sums[column] += x * y[column];
      }
    }
  }
  group.pending.erase(group.pending.begin());
  ++group.completed;
}

void products_wait(int pending) {
  BlockState& state = block();
  if (!state.meet("products_wait")) return;
  Warpgroup& group = state.warpgroups[state.running / 128];
  group.may_write = false;
  if (state.options.fault != Fault::kUnfinishedProducts) {
    while (group.pending.size() > static_cast<size_t>(pending)) state.complete_group(group);
  }
  for (auto& sums : group.sums) {
    if (sums->last_group > group.committed - pending || state.options.fault == Fault::kUnfinishedProducts)
      continue;
    for (int row = 0; row < 64; ++row)
      for (int column = 0; column < sums->columns; ++column) {
        const Place at = accumulator(row, column);
        sums->registers[at.thread][at.element] = sums->values[row * sums->columns + column];
      }
    sums.reset();
  }
  group.sums.erase(std::remove(group.sums.begin(), group.sums.end(), nullptr), group.sums.end());
  state.part();
}

// --- Special functions
// ---------------------------------------------------------------------------------------

namespace {

// What PTX allows ex2.approx and lg2.approx to be wrong by, of the result's size.
constexpr float kWrong = 0x1p-22f;

// A number between -1 and 1 that depends on x alone.
float noise(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits ^ bits >> 15) * 0x9E3779B1u;
  return static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
}

}  // namespace

// Powers of two are exact, and denormal numbers are 0.
float exp2(float x) {
  const float y = std::exp2(x);
  if (y < FLT_MIN) return 0;
  return x == std::floor(x) ? y : y * (1 + kWrong * noise(x));
}
float log2(float x) {
  const float y = std::log2(x < FLT_MIN && x >= 0 ? 0.f : x);
  if (y == std::floor(y)) return y;
  return y + kWrong * noise(x) * std::max(1.f, std::fabs(y));
}

// --- 16-bit numbers
// ------------------------------------------------------------------------------------------

float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits >> 15 != 0 ? -x : x;
}

uint16_t to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7E00;
  if (size == 0) return sign;
  if (size >= 65520.f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const float scaled = std::nearbyint(std::ldexp(size, -unit));
  return sign | (unit == -24 ? static_cast<uint16_t>(scaled)
                             : static_cast<uint16_t>((unit + 24) * 1024 + static_cast<int>(scaled)));
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace fastattn::cuda::emulated

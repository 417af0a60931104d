// Instructions that only touch registers.

#pragma once

#include <utility>

#include "warp.h"

class Arithmetic {
 public:
  Arithmetic(const Launch& launch, const Instruction& instruction, Warp& warp, uint32_t mask)
      : launch_(launch), in_(instruction), warp_(warp), mask_(mask) {}

  // False if the instruction is none of these.
  bool run() { return moves() || integers() || logic() || conversions() || floats(); }

 private:
  using u32 = uint32_t;
  using u64 = uint64_t;
  using s32 = int32_t;
  using s64 = int64_t;

  // operand 0 = f(operand 1, operand 2, ...), lane by lane
  template <class Out, class... In, class F>
  bool map(F f) {
    return map_operands<Out, In...>(f, std::index_sequence_for<In...>());
  }

  template <class Out, class... In, class F, size_t... I>
  bool map_operands(F f, std::index_sequence<I...>) {
    for (int lane = 0; lane < kLanes; lane++) {
      if (mask_ >> lane & 1) {
        warp_.set<Out>(in_.operand[0], lane, static_cast<Out>(f(warp_.get<In>(in_.operand[I + 1], lane)...)));
      }
    }
    return true;
  }

  // The same for pairs of bfloat16, each rounded.
  template <class... In, class F>
  bool map_halves(F f) {
    return map<u32, In...>([f](auto... words) {
      const u32 low = to_bfloat16(f(from_bfloat16(words & 0xffff)...));
      return low | to_bfloat16(f(from_bfloat16(words >> 16)...)) << 16;
    });
  }

  // The same for pairs of float.
  template <class... In, class F>
  bool map_pairs(F f) {
    return map<u64, In...>([f](auto... words) {
      const u64 low = bits<u32>(f(bits<float>(static_cast<u32>(words))...));
      return low | static_cast<u64>(bits<u32>(f(bits<float>(static_cast<u32>(words >> 32))...))) << 32;
    });
  }

  template <class F>
  bool map_predicates(F f) {
    const int second = in_.operand[2] >= 0 ? in_.operand[2] : in_.operand[1];
    warp_.set_predicate(in_.operand[0], mask_, f(warp_.predicates[in_.operand[1]], warp_.predicates[second]));
    return true;
  }

  bool moves() {
    switch (in_.operation) {
      case NOP: return true;
      case MOV32: return map<u32, u32>([](u32 a) { return a; });
      case MOV64: return map<u64, u64>([](u64 a) { return a; });
      case MOVP: {
        const u32 constant = in_.immediate ? kAllLanes : 0;
        warp_.set_predicate(in_.operand[0], mask_, in_.operand[1] >= 0 ? warp_.predicates[in_.operand[1]] : constant);
        return true;
      }
      case PACK: return map<u32, u32, u32>([](u32 low, u32 high) { return (low & 0xffff) | high << 16; });
      case UNPACK: return unpack<u32>(16);
      case PACK64: return map<u64, u32, u32>([](u64 low, u64 high) { return low | high << 32; });
      case UNPACK64: return unpack<u64>(32);
      case SELP32: return select<u32>();
      case SELP64: return select<u64>();
      case PARAMETER: {
        u64 value = 0;
        memcpy(&value, launch_.parameters + in_.immediate, in_.bytes);
        return in_.bytes == 8 ? map<u64>([=] { return value; }) : map<u32>([=] { return value; });
      }
      default: return false;
    }
  }

  template <class T>
  bool unpack(int half) {
    for (int lane = 0; lane < kLanes; lane++) {
      if (!(mask_ >> lane & 1)) continue;
      const T whole = warp_.get<T>(in_.operand[2], lane);
      warp_.set<u32>(in_.operand[0], lane, whole & ((T{1} << half) - 1));
      warp_.set<u32>(in_.operand[1], lane, whole >> half);
    }
    return true;
  }

  template <class T>
  bool select() {
    const u32 chosen = warp_.predicates[in_.operand[3]];
    for (int lane = 0; lane < kLanes; lane++) {
      const int from = in_.operand[chosen >> lane & 1 ? 1 : 2];
      if (mask_ >> lane & 1) warp_.set<T>(in_.operand[0], lane, warp_.get<T>(from, lane));
    }
    return true;
  }

  bool integers() {
    const auto add = [](auto a, auto b) { return a + b; };
    const auto subtract = [](auto a, auto b) { return a - b; };
    const auto multiply = [](auto a, auto b) { return a * b; };
    const auto multiply_add = [](auto a, auto b, auto c) { return a * b + c; };
    const auto minimum = [](auto a, auto b) { return std::min(a, b); };
    const auto maximum = [](auto a, auto b) { return std::max(a, b); };
    const auto short_of = [](auto f) { return [f](auto... words) { return f(words...) & 0xffff; }; };
    switch (in_.operation) {
      case ADD32: return map<u32, u32, u32>(add);
      case SUB32: return map<u32, u32, u32>(subtract);
      case MUL32: return map<u32, u32, u32>(multiply);
      case MAD32: return map<u32, u32, u32, u32>(multiply_add);
      case ADD64: return map<u64, u64, u64>(add);
      case SUB64: return map<u64, u64, u64>(subtract);
      case MUL64: return map<u64, u64, u64>(multiply);
      case MAD64: return map<u64, u64, u64, u64>(multiply_add);
      case ADD16: return map<u32, u32, u32>(short_of(add));
      case SUB16: return map<u32, u32, u32>(short_of(subtract));
      case MUL16: return map<u32, u32, u32>(short_of(multiply));
      case MAD16: return map<u32, u32, u32, u32>(short_of(multiply_add));
      case MUL_WIDE_U32: return map<u64, u32, u32>([](u64 a, u64 b) { return a * b; });
      case MUL_WIDE_S32: return map<s64, s32, s32>([](s64 a, s64 b) { return a * b; });
      case MUL_HI_U16: return map<u32, u32, u32>([](u32 a, u32 b) { return a * b >> 16; });
      case MUL_WIDE_U16: return map<u32, u32, u32>([](u32 a, u32 b) { return (a & 0xffff) * (b & 0xffff); });
      case MUL_HI_U32: return map<u32, u32, u32>([](u64 a, u64 b) { return a * b >> 32; });
      case MUL_HI_S32: return map<s32, s32, s32>([](s64 a, s64 b) { return a * b >> 32; });
      case DIV_U32: return map<u32, u32, u32>([](u32 a, u32 b) { return b ? a / b : kAllLanes; });
      case REM_U32: return map<u32, u32, u32>([](u32 a, u32 b) { return b ? a % b : a; });
      case DIV_S32: return map<s32, s32, s32>([](s64 a, s64 b) { return b ? a / b : -1; });
      case REM_S32: return map<s32, s32, s32>([](s64 a, s64 b) { return b ? a % b : a; });
      case MIN_S32: return map<s32, s32, s32>(minimum);
      case MAX_S32: return map<s32, s32, s32>(maximum);
      case MAX_RELU_S32: return map<s32, s32, s32>([](s32 a, s32 b) { return std::max({a, b, 0}); });
      case MIN_U32: return map<u32, u32, u32>(minimum);
      case MIN_U64: return map<u64, u64, u64>(minimum);
      case MAX_U32: return map<u32, u32, u32>(maximum);
      case NEG32: return map<u32, u32>([](u32 a) { return 0 - a; });
      default: return false;
    }
  }

  bool logic() {
    const auto both = [](auto a, auto b) { return a & b; };
    const auto either = [](auto a, auto b) { return a | b; };
    const auto differ = [](auto a, auto b) { return a ^ b; };
    const auto inverted = [](auto a) { return ~a; };
    switch (in_.operation) {
      case AND32: return map<u32, u32, u32>(both);
      case OR32: return map<u32, u32, u32>(either);
      case XOR32: return map<u32, u32, u32>(differ);
      case NOT32: return map<u32, u32>(inverted);
      case AND64: return map<u64, u64, u64>(both);
      case OR64: return map<u64, u64, u64>(either);
      case XOR64: return map<u64, u64, u64>(differ);
      case NOT64: return map<u64, u64>(inverted);
      case ANDP: return map_predicates(both);
      case ORP: return map_predicates(either);
      case XORP: return map_predicates(differ);
      case NOTP: return map_predicates([](u32 a, u32) { return ~a; });
      case SHL32: return map<u32, u32, u32>([](u32 a, u32 b) { return b > 31 ? 0 : a << b; });
      case SHL16: return map<u32, u32, u32>([](u32 a, u32 b) { return b > 15 ? 0 : a << b & 0xffff; });
      case SHR_U32: return map<u32, u32, u32>([](u32 a, u32 b) { return b > 31 ? 0 : a >> b; });
      case SHR_S32: return map<s32, s32, u32>([](s32 a, u32 b) { return a >> std::min(b, 31u); });
      case SHL64: return map<u64, u64, u32>([](u64 a, u32 b) { return b > 63 ? 0 : a << b; });
      case SHR_U64: return map<u64, u64, u32>([](u64 a, u32 b) { return b > 63 ? 0 : a >> b; });
      case SHR_S64: return map<s64, s64, u32>([](s64 a, u32 b) { return a >> std::min(b, 63u); });
      case BFE_U32:
        return map<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return extract_bits(a, b, c, 32, false); });
      case BFE_S32: return map<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return extract_bits(a, b, c, 32, true); });
      case BFE_U64:
        return map<u64, u64, u32, u32>([](u64 a, u32 b, u32 c) { return extract_bits(a, b, c, 64, false); });
      case BFE_S64: return map<u64, u64, u32, u32>([](u64 a, u32 b, u32 c) { return extract_bits(a, b, c, 64, true); });
      case BFI32: return map<u32, u32, u32, u32, u32>(insert_bits);
      case PRMT: return map<u32, u32, u32, u32>(permute_bytes);
      case LOP3: return map<u32, u32, u32, u32, u32>(look_up);
      case SETP: return set_predicate();
      default: return false;
    }
  }

  bool set_predicate() {
    u32 value = 0;
    switch (in_.kind) {
      case U32: value = compare<u32>([](u32 a) { return a; }); break;
      case S32: value = compare<s32>([](s32 a) { return a; }); break;
      case F32: value = compare<float>([](float a) { return a; }); break;
      case U64: value = compare<u64>([](u64 a) { return a; }); break;
      case S64: value = compare<s64>([](s64 a) { return a; }); break;
      case U16: value = compare<u32>([](u32 a) { return a & 0xffff; }); break;
      case S16: value = compare<u32>([](u32 a) { return static_cast<int16_t>(a); }); break;
    }
    if (in_.count != ALONE) {
      const u32 other = warp_.predicates[in_.operand[3]] ^ (in_.bytes ? kAllLanes : 0);
      value = in_.count == AND ? value & other : in_.count == OR ? value | other : value ^ other;
    }
    warp_.set_predicate(in_.operand[0], mask_, value);
    return true;
  }

  template <class T, class F>
  u32 compare(F convert) {
    u32 found = 0;
    for (int lane = 0; lane < kLanes; lane++) {
      const auto a = convert(warp_.get<T>(in_.operand[1], lane)), b = convert(warp_.get<T>(in_.operand[2], lane));
      const bool less = a<b, greater = a> b, equal = a == b;  // none of them of a NaN
      const bool number = less || greater || equal;
      const bool holds[] = {equal, less || greater, less, less || equal, greater, greater || equal};
      const bool chosen = in_.mode < EQU ? holds[in_.mode] : in_.mode < NUM ? !number || holds[in_.mode - EQU] : number;
      found |= static_cast<u32>(in_.mode == NAN_ ? !number : chosen) << lane;
    }
    return found;
  }

  bool conversions() {
    switch (in_.operation) {
      case U16_TO_U32: return map<u32, u32>([](u32 a) { return a & 0xffff; });
      case S16_TO_S32: return map<s32, u32>([](u32 a) { return static_cast<int16_t>(a); });
      case U32_TO_U64: return map<u64, u32>([](u32 a) { return a; });
      case S32_TO_S64: return map<s64, s32>([](s32 a) { return a; });
      case U64_TO_U32: return map<u32, u64>([](u64 a) { return a; });
      case S32_TO_F32: return map<float, s32>([](s32 a) { return a; });
      case U32_TO_F32: return map<float, u32>([](u32 a) { return a; });
      case BF16_TO_F32: return map<float, u32>(from_bfloat16);
      case F32_TO_BF16: return map<u32, float>(to_bfloat16);
      case F32_TO_S32: return map<s32, float>(truncated);
      case F32_TO_BF16X2:
        return map<u32, float, float>([](float high, float low) { return to_bfloat16(low) | to_bfloat16(high) << 16; });
      default: return false;
    }
  }

  bool floats() {
    const auto add = [](float a, float b) { return a + b; };
    const auto subtract = [](float a, float b) { return a - b; };
    const auto multiply = [](float a, float b) { return a * b; };
    const auto multiply_add = [](float a, float b, float c) { return fmaf(a, b, c); };
    switch (in_.operation) {
      case ADD_F32: return map<float, float, float>(add);
      case SUB_F32: return map<float, float, float>(subtract);
      case MUL_F32: return map<float, float, float>(multiply);
      case FMA_F32: return map<float, float, float, float>(multiply_add);
      case DIV_F32: return map<float, float, float>([](float a, float b) { return a / b; });
      case NEG_F32: return map<u32, u32>([](u32 a) { return a ^ 0x80000000; });
      case ABS_F32: return map<u32, u32>([](u32 a) { return a & 0x7fffffff; });
      case MIN_F32: return map<float, float, float>(fminf);
      case MAX_F32: return map<float, float, float>(fmaxf);
      case MAX_NAN_F32: return map<float, float, float>(maximum_or_nan);
      case MIN_NAN_F32: return map<float, float, float>(minimum_or_nan);
      case EXP2_F32:
        return map<float, float>([this](float a) { return approximate(flush_subnormal(exp2f(flush_subnormal(a)))); });
      case LOG2_F32: return map<float, float>([this](float a) { return approximate(log2f(a)); });
      case RECIPROCAL_F32: return map<float, float>([this](float a) { return approximate(1.0f / a); });
      case SQRT_F32: return map<float, float>([this](float a) { return approximate(sqrtf(a)); });
      case RSQRT_F32: return map<float, float>([this](float a) { return approximate(1.0 / sqrt(double{a})); });
      case ADD_BF16X2: return map_halves<u32, u32>(add);
      case SUB_BF16X2: return map_halves<u32, u32>(subtract);
      case MUL_BF16X2: return map_halves<u32, u32>(multiply);
      case FMA_BF16X2: return map_halves<u32, u32, u32>(multiply_add);
      case MAX_NAN_BF16X2: return map_halves<u32, u32>(maximum_or_nan);
      case MIN_NAN_BF16X2: return map_halves<u32, u32>(minimum_or_nan);
      case NEG_BF16X2: return map<u32, u32>([](u32 a) { return a ^ 0x80008000; });
      case ABS_BF16X2: return map<u32, u32>([](u32 a) { return a & 0x7fff7fff; });
      case ADD_F32X2: return map_pairs<u64, u64>(add);
      case SUB_F32X2: return map_pairs<u64, u64>(subtract);
      case MUL_F32X2: return map_pairs<u64, u64>(multiply);
      case FMA_F32X2: return map_pairs<u64, u64, u64>(multiply_add);
      default: return false;
    }
  }

  // Moves a value by up to `noise` units in the last place, the same value always by the same.
  float approximate(float value) const {
    if (!launch_.noise || !std::isfinite(value)) return value;
    const u32 word = bits<u32>(value), hash = word * 2654435761u >> 8;
    return bits<float>(word + hash % (2 * launch_.noise + 1) - launch_.noise);
  }

  const Launch& launch_;
  const Instruction& in_;
  Warp& warp_;
  const u32 mask_;
};

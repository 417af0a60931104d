// A program as the parser (tests/ptx/ptx.py) hands it over, and a launch of it. Layouts are shared with Python.

#pragma once

#include <cstdint>

// Registers hold 32 or 64 bits a lane, predicates one; types are those of the operation. Unless said otherwise operand
// 0 is the destination. Addresses are operand 0 (64 bits) or operand 1 (32 bits), whichever is not -1, plus
// `immediate`.
#define OPERATIONS(X)                                                                                                  \
  /* moves */                                                                                                          \
  X(NOP)                                                                                                               \
  X(MOV32)                                                                                                             \
  X(MOV64)                                                                                                             \
  X(MOVP) X(PACK) X(UNPACK) X(PACK64) X(UNPACK64) X(SPECIAL) X(PARAMETER) X(SELP32) X(SELP64) /* integers */           \
      X(ADD32) X(SUB32) X(MUL32) X(MAD32) X(ADD64) X(SUB64) X(MUL64) X(MAD64) X(MUL_WIDE_U32) X(MUL_WIDE_S32)          \
          X(MUL_HI_U32) X(MUL_HI_S32) X(DIV_U32) X(DIV_S32) X(REM_U32) X(REM_S32) X(MIN_S32) X(MAX_S32) X(MIN_U32)     \
          X(MAX_RELU_S32) X(MUL_HI_U16) X(MUL_WIDE_U16) X(MIN_U64)                                                     \
              X(MAX_U32) X(NEG32) X(ADD16) X(SUB16) X(MUL16) X(MAD16) /* bits and predicates */                        \
      X(AND32) X(OR32) X(XOR32) X(NOT32) X(AND64) X(OR64) X(XOR64) X(NOT64) X(ANDP) X(ORP) X(XORP) X(NOTP) X(SHL32)    \
          X(SHL16) X(SHR_U32) X(SHR_S32) X(SHL64) X(SHR_U64) X(SHR_S64) X(BFE_U32) X(BFE_S32) X(BFE_U64) X(BFE_S64)    \
              X(BFI32) X(PRMT) X(LOP3) X(SETP) /* conversions */                                                       \
      X(U16_TO_U32) X(S16_TO_S32) X(U32_TO_U64) X(S32_TO_S64) X(U64_TO_U32) X(S32_TO_F32) X(U32_TO_F32) X(BF16_TO_F32) \
          X(F32_TO_BF16) X(F32_TO_BF16X2) X(F32_TO_S32) /* floating point */                                           \
      X(ADD_F32) X(SUB_F32) X(MUL_F32) X(FMA_F32) X(DIV_F32) X(NEG_F32) X(ABS_F32) X(MIN_F32) X(MAX_F32)               \
          X(MAX_NAN_F32) X(MIN_NAN_F32) X(EXP2_F32) X(LOG2_F32) X(RECIPROCAL_F32) X(SQRT_F32) X(RSQRT_F32)             \
          X(ADD_BF16X2) X(SUB_BF16X2) X(MUL_BF16X2) X(FMA_BF16X2) X(MAX_NAN_BF16X2) X(MIN_NAN_BF16X2)                  \
          X(NEG_BF16X2) X(ABS_BF16X2)                                                                                  \
              X(ADD_F32X2) X(SUB_F32X2) X(MUL_F32X2) X(FMA_F32X2) /* memory and control */                             \
      X(LOAD) X(STORE) X(LOAD_MATRIX) X(STORE_MATRIX) X(BRANCH) X(BRANCH_INDEX) X(RETURN) X(TRAP) X(ELECT)             \
          X(SHUFFLE_INDEX) X(SHUFFLE_XOR) X(SHUFFLE_DOWN) X(SHUFFLE_UP) /* synchronisation */                          \
      X(BARRIER) X(WARP_BARRIER) X(MBARRIER_INIT) X(MBARRIER_ARRIVE) X(MBARRIER_EXPECT) X(MBARRIER_WAIT)               \
          X(PROXY_FENCE) X(MMA) /* asynchronous */                                                                     \
      X(TMA_LOAD) X(CP_ASYNC) X(CP_ASYNC_COMMIT) X(CP_ASYNC_WAIT) X(WGMMA) X(WGMMA_COMMIT) X(WGMMA_WAIT)

enum Operation : int32_t {
#define X(name) name,
  OPERATIONS(X)
#undef X
      OPERATION_COUNT
};

constexpr const char* kOperationNames[] = {
#define X(name) #name,
    OPERATIONS(X)
#undef X
};

enum Space : int32_t { GENERIC, GLOBAL, SHARED };
enum SpecialRegister : int32_t { TID, CTAID_X, CTAID_Y, CTAID_Z, NTID, LANEID, NCTAID_X, NCTAID_Y, NCTAID_Z, ZERO };
enum ComparedType : int32_t { U32, S32, F32, U64, S64, U16, S16 };
enum Comparison : int32_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };  // U: or a NaN
enum Combination : int32_t { ALONE, AND, OR, XOR };

struct Instruction {
  int32_t operation;
  int32_t predicate, negated;  // register or -1
  int32_t line;                // of the PTX
  int32_t operand[8];
  int64_t immediate;  // of addresses; target of BRANCH, offset of PARAMETER, groups that may stay of a wait
  int32_t kind;       // Space of LOAD and STORE, SpecialRegister, ComparedType; bits of WGMMA: A, B is transposed
  int32_t mode;       // Comparison of SETP; whether LOAD_MATRIX is transposed; offset of the source of CP_ASYNC
  int32_t bytes;      // of an element of LOAD and STORE, PARAMETER, CP_ASYNC; whether operand 3 of SETP is negated
  int32_t count;      // elements of LOAD and STORE, matrices, arrivals, columns of WGMMA; Combination of SETP
  int32_t list, list_length;  // registers of a vector: values of LOAD and STORE, coordinates, accumulators;
                              // of MMA: 4 of D, 4 of A, 2 of B, 4 of C; or the targets of BRANCH_INDEX
};
static_assert(sizeof(Instruction) == 80, "the layout is shared with Python");

struct Array {  // in device memory
  uint64_t begin, end;
  int32_t writable, number;
};

enum Policy : int32_t {  // of interleaving warps
  ROUND_ROBIN,
  RANDOM,
  UNTIL_IT_WAITS,
  LATE_COPIES,   // a fixed order of warps; copies arrive when nobody can go on without
  EARLY_COPIES,  // the reverse order; copies arrive at once
};

struct Launch {
  const Instruction* code;
  const int32_t* lists;
  const uint32_t* constants32;  // they fill the last registers
  const uint64_t* constants64;
  const uint8_t* parameters;
  const Array* arrays;
  uint64_t seed;
  int32_t code_length, registers32, registers64, predicates, constants32_length, constants64_length;
  int32_t parameter_bytes, array_count;
  int32_t grid[3], block[3], shared_bytes;
  int32_t policy;
  int32_t noise;  // units in the last place by which exponentials, logarithms and reciprocals are moved
};

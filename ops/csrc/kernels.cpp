// The ops of a backend on a CPU, with the contracts of ops/blocks.py, ops/reduction.py and ops/adam.py, those
// with one scale per tensor, ops/per_tensor.py, and the weight functions of ops/products.py: same codes, same
// scales. A batch of blocks is decoded into FP32 in L1 by its format, computed, and encoded by its format;
// no longer buffer lies between. Compiled once per instruction set, which ISA names, and without fused
// multiply-add: the order of roundings is part of the contract.
#include "tensors.h"
#include "weights.h"

#define JOIN(name, isa) name##_##isa
#define NAMED(name, isa) JOIN(name, isa)
#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT NAMED(quantize, ISA)(const ISA::Values* values, int64_t count, const ISA::Blocks* out, int64_t blocks,
                            int n, int threads, ISA::GradientCounts* counts) {
    ISA::quantize(*values, count, *out, blocks, n, threads, counts);
}
EXPORT NAMED(dequantize, ISA)(const ISA::Blocks* blocks, const ISA::Values* out, int64_t count, int n,
                              int threads) {
    ISA::dequantize(*blocks, *out, count, n, threads);
}
EXPORT NAMED(accumulate, ISA)(const ISA::Blocks* pieces, int ranks, const ISA::Blocks* shard, int overwrite,
                              int64_t blocks, int n, int threads, ISA::NormParts* parts) {
    ISA::accumulate(pieces, ranks, *shard, overwrite, blocks, n, threads, parts);
}
EXPORT NAMED(adam_step, ISA)(ISA::Sweep* sweep, int threads) { ISA::adam_step(*sweep, threads); }
EXPORT NAMED(quantize_tensor, ISA)(const ISA::Values* values, int64_t count, const ISA::Blocks* out,
                                   int64_t blocks, int n, int threads, ISA::GradientCounts* counts) {
    ISA::quantize_tensor(*values, count, *out, blocks, n, threads, counts);
}
EXPORT NAMED(accumulate_tensor, ISA)(const ISA::Blocks* pieces, int ranks, const ISA::Blocks* shard,
                                     int overwrite, int64_t blocks, int n, int threads,
                                     ISA::NormParts* parts) {
    ISA::accumulate_tensor(pieces, ranks, *shard, overwrite, blocks, n, threads, parts);
}
EXPORT NAMED(step_tensors, ISA)(ISA::Sweep* sweep, int threads) { ISA::step_tensors(*sweep, threads); }
EXPORT NAMED(find_exponents, ISA)(const uint16_t* values, const ISA::Run* run, uint8_t* exponents,
                                  int threads) {
    ISA::find_exponents(values, *run, exponents, threads);
}
EXPORT NAMED(encode_weight, ISA)(const uint16_t* values, const ISA::Run* run, const uint8_t* exponents,
                                 char* codes, int threads) {
    ISA::encode_weight(values, *run, exponents, codes, threads);
}
EXPORT NAMED(decode_weight, ISA)(const uint8_t* codes, const ISA::Run* run, const uint8_t* exponents,
                                 const ISA::Values* out, int threads) {
    ISA::decode_weight(codes, *run, exponents, *out, threads);
}

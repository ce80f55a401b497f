// Selects the compiled instruction set for this processor.

extern "C" __attribute__((visibility("default"))) const char* best_isa() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";  // every processor with AVX2 converts halves, too
#endif
    return "portable";
}

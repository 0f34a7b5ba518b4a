/* Whether the processor and the system know AVX2, FMA and F16C; included by each `_native.c`. A few
 * lines of our own for x86-64, where the compiler's `__builtin_cpu_supports` brings 4 KB along. */

#if defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>

static int processor_has_avx2(void) {
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 6) != 6) return 0; /* the system keeps no registers of 256 bits */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}
#else
static int processor_has_avx2(void) { return HAS_AVX2; } /* as it was built for */
#endif

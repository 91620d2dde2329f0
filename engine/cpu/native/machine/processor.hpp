// What each family of processors calls by names of its own: its vectors' header, a line asked for ahead of its use, a
// pause of who waits for another.
#pragma once

#ifdef __ARM_NEON
#include <arm_neon.h>
#else
#include <cpuid.h>
#include <immintrin.h>
#endif

enum class Near { kFirst, kSecond };  // the cache that a line shall come to, as seen from the core

// Where lines come to that are asked for ahead of attention. A Zen waits for 24 at a time that shall come to its first cache,
// and for more that shall come to its second: keys and values in scattered blocks at 15 GB/s in place of 9 (Zen 4).
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
constexpr Near kLinesTo = Near::kSecond;
#else
constexpr Near kLinesTo = Near::kFirst;  // the other one gains a Zen 3 nothing; elsewhere nobody has measured it
#endif

// Ask for the line at `address`, wherever that is: nothing happens where there is no memory.
template <Near NEAR = Near::kFirst>
[[gnu::always_inline]] inline void fetch_line(const void* address) {
#ifdef __ARM_NEON
    if (NEAR == Near::kFirst) asm volatile("prfm pldl1keep, %0" : : "Q"(*(const char*)address));
    else asm volatile("prfm pldl2keep, %0" : : "Q"(*(const char*)address));
#else
    _mm_prefetch((const char*)address, NEAR == Near::kFirst ? _MM_HINT_T0 : _MM_HINT_T1);
#endif
}

#ifdef __AVX512BF16__
// Of AMD's family 19h a Zen 4 alone has AVX-512.
inline const bool kIsZen4 = [] {
    unsigned version = 0, maker = 0, other = 0, most = 0;
    __get_cpuid(0, &most, &maker, &other, &other);
    __get_cpuid(1, &version, &other, &other, &other);
    return maker == signature_AMD_ebx && (version >> 8 & 15) + (version >> 20 & 255) == 0x19;
}();
#else
constexpr bool kIsZen4 = false;  // or it does without
#endif

// Leave the core's units to others for a moment: of who looks again and again whether he may go on. ARM's own hint for it,
// YIELD, is none to most of its cores; ISB waits until what is under way has been done.
inline void relax() {
#ifdef __ARM_NEON
    asm volatile("isb" : : : "memory");
#else
    _mm_pause();
#endif
}

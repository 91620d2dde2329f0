// What each family of processors calls by names of its own: its vectors' header, a line asked for ahead of its use, a
// pause of who waits for another.
#pragma once

#ifdef __ARM_NEON
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

enum class Near { kFirst, kSecond };  // the cache that a line shall come to, as seen from the core

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

// Leave the core's units to others for a moment: of who looks again and again whether he may go on. ARM's own hint for it,
// YIELD, is none to most of its cores; ISB waits until what is under way has been done.
inline void relax() {
#ifdef __ARM_NEON
    asm volatile("isb" : : : "memory");
#else
    _mm_pause();
#endif
}

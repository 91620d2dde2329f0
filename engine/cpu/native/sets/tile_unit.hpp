// The matrix unit's instructions: eight tiles of up to 16 rows of 64 bytes, each named by a literal number. A test has a
// header of its own in place of this one, and so tries the code around it without the unit.
#pragma once

#ifdef KVFERRY_TILE_UNIT
#include KVFERRY_TILE_UNIT
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SHAPE_TILES(shape) _tile_loadconfig(shape)
#define RELEASE_TILES() _tile_release()
#define CLEAR_TILE(tile) _tile_zero(tile)
#define LOAD_TILE(tile, source, stride) _tile_loadd(tile, source, stride)
#define LOAD_TILE_ONCE(tile, source, stride) _tile_stream_loadd(tile, source, stride)
#define STORE_TILE(tile, target, stride) _tile_stored(tile, target, stride)
#define ADD_PRODUCTS_OF_TILES(sums, inputs, weights) _tile_dpbf16ps(sums, inputs, weights)

// Ask the kernel, once for all threads of the process.
inline bool may_use_tiles() {
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, since Linux 5.16
    return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

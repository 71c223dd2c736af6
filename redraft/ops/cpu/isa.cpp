#include "isa.h"

#include <cpuid.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace redraft {
namespace {

constexpr Isa ALL[] = {Isa::AVX2, Isa::AVX512, Isa::AVX512_VNNI, Isa::AVX512_BF16, Isa::AMX};

struct Leaf {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    Leaf(uint32_t leaf, uint32_t sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }  // zeros if there is no such leaf
};

constexpr bool all(uint64_t word, uint64_t bits) { return (word & bits) == bits; }
constexpr uint64_t bit(int n) { return uint64_t(1) << n; }

// The register states that the operating system saves for a thread. Without them an instruction of the processor cannot be used.
uint64_t saved_states() {
    constexpr int OSXSAVE = 27;
    if (!all(Leaf(1, 0).c, bit(OSXSAVE))) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

constexpr uint64_t YMM = bit(1) | bit(2);
constexpr uint64_t ZMM = YMM | bit(5) | bit(6) | bit(7);  // masks, upper halves, the registers 16 to 31
constexpr uint64_t TILES = bit(17) | bit(18);             // configuration and data

bool has_avx2(const Leaf& one, const Leaf& seven) {
    constexpr uint64_t ONE = bit(12) | bit(20) | bit(23) | bit(28) | bit(29);  // FMA, SSE4.2, POPCNT, AVX, F16C
    constexpr uint64_t SEVEN = bit(5) | bit(8);                                // AVX2, BMI2
    return all(one.c, ONE) && all(seven.b, SEVEN);
}

bool has_avx512(const Leaf& seven) { return all(seven.b, bit(16) | bit(17) | bit(30) | bit(31)); }  // F, DQ, BW, VL

bool has_avx512_vnni(const Leaf& seven) { return all(seven.c, bit(11)); }

bool has_avx512_bf16() { return all(Leaf(7, 1).a, bit(5)); }

bool has_amx(const Leaf& seven) { return all(seven.d, bit(22) | bit(24) | bit(25)); }  // BF16, TILE, INT8

// Tiles are large, so the kernel saves them only for processes that requested it; others die of an illegal instruction.
bool tiles_granted() {
#ifdef __linux__
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

Isa look() {
    const Leaf one(1, 0), seven(7, 0);
    const uint64_t saved = saved_states();
    if (!all(saved, YMM) || !has_avx2(one, seven)) return Isa::NONE;
    if (!all(saved, ZMM) || !has_avx512(seven)) return Isa::AVX2;
    if (!has_avx512_vnni(seven)) return Isa::AVX512;
    if (!has_avx512_bf16()) return Isa::AVX512_VNNI;
    if (!all(saved, TILES) || !has_amx(seven) || !tiles_granted()) return Isa::AVX512_BF16;
    return Isa::AMX;
}

struct Choice {
    Isa isa;
    std::string refused;
};

Choice choose() {
    const Isa best = detect() < compiled() ? detect() : compiled();
    const char* wanted = std::getenv("REDRAFT_ISA");
    if (!wanted || !*wanted) return {best, ""};
    const std::string reported = std::string("REDRAFT_ISA = ") + wanted;
    for (Isa isa : ALL) {
        if (std::strcmp(wanted, name_of(isa)) != 0) continue;
        if (isa <= best) return {isa, ""};
        if (isa > detect()) return {best, reported + ": this machine has " + name_of(detect()) + " at most"};
        return {best, reported + ": this library was compiled for " + name_of(compiled()) + " at most"};
    }
    return {best, reported + ": allowed: avx2, avx512, avx512_vnni, avx512_bf16, amx"};
}

const Choice& choice() {
    static const Choice made = choose();
    return made;
}

}  // namespace

Isa detect() {
    static const Isa found = look();
    return found;
}

Isa compiled() {
#if defined(REDRAFT_HAS_AMX)
    return Isa::AMX;
#elif defined(REDRAFT_HAS_AVX512_BF16)
    return Isa::AVX512_BF16;
#elif defined(REDRAFT_HAS_AVX512_VNNI)
    return Isa::AVX512_VNNI;
#elif defined(REDRAFT_HAS_AVX512)
    return Isa::AVX512;
#elif defined(REDRAFT_HAS_AVX2)
    return Isa::AVX2;
#else
    return Isa::NONE;
#endif
}

Isa chosen_isa() { return choice().isa; }

const char* refused_isa() { return choice().refused.empty() ? nullptr : choice().refused.c_str(); }

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::AVX2: return "avx2";
        case Isa::AVX512: return "avx512";
        case Isa::AVX512_VNNI: return "avx512_vnni";
        case Isa::AVX512_BF16: return "avx512_bf16";
        case Isa::AMX: return "amx";
        default: return "none";
    }
}

}  // namespace redraft

// The peak arithmetic of one core: loops over registers only, one file for each instruction set.
#pragma once
#include <cstdint>

namespace redraft {

// The peak loop for numbers of one kind. `run` does `rounds` rounds of `operations` additions and multiplications each; null if the
// instruction set has no instruction for such numbers.
struct Peak {
    void (*run)(int64_t rounds);
    double operations;
    const char* instruction;
};

enum PeakKind : int { PEAK_F32 = 0, PEAK_BF16 = 1, PEAK_I8 = 2 };

Peak peak_avx2(int kind);
Peak peak_avx512(int kind);
Peak peak_avx512_vnni(int kind);
Peak peak_avx512_bf16(int kind);
Peak peak_amx(int kind);

}  // namespace redraft

// Which instruction set the kernels use: the best that the processor, the operating system and the compiler of this library share.
#pragma once

namespace redraft {

enum class Isa : int { NONE, AVX2, AVX512, AVX512_BF16, AMX };  // each has what those before it have

Isa detect();               // what this machine can run; asks the kernel once for leave to use AMX tiles
Isa compiled();             // the best that this library has code for
Isa chosen_isa();           // the lesser of both, lowered by the environment's REDRAFT_ISA (read once) where that is not refused
const char* refused_isa();  // why REDRAFT_ISA was refused, or null
const char* name_of(Isa);   // "none", "avx2", "avx512", "avx512_bf16", "amx"

}  // namespace redraft

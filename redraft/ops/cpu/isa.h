// The instruction set of the kernels: the best one that the processor, the operating system and the compiler all support.
#pragma once

namespace redraft {

enum class Isa : int { NONE, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, AMX };  // each includes those before it

Isa detect();               // what this machine can run; requests the permission for AMX tiles from the kernel once
Isa compiled();             // the best that this library has code for
Isa chosen_isa();           // the lesser of both, lowered by REDRAFT_ISA (read once) unless that is refused
const char* refused_isa();  // the reason why REDRAFT_ISA was refused, or null
const char* name_of(Isa);   // "none", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"

}  // namespace redraft

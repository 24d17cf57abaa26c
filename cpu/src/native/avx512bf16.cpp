#define ATHANOR_ISA avx512bf16
#include "isa.hpp"

#define ATHANOR_ISA avx512
#include "isa.hpp"

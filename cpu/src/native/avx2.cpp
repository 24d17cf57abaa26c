#define ATHANOR_ISA avx2
#include "isa.hpp"

/* The kernels of ops/common/fused.py: all of a training step between its matrix products, forward and backward, each in one
   pass over memory. One file for each family of kernels, compiled as one unit.

   B sequences of T positions; a row is one position of one sequence. Inputs and outputs of matrix products are of
   `type`, float32 or bfloat16; all else is float32. A sum over rows is computed in PARTS parts (defined by fused.py),
   which the caller adds up, or for each sequence: its bits do not depend on the number of threads. */

#include "ops/common/norm_shift.c"
#include "ops/rwkv1/time_mix.c"
#include "ops/common/lags.c"
#include "ops/common/gates.c"
#include "ops/common/scale.c"

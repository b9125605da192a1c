/* The kernels of ops/common/fused.py, which compute the operations between the matrix products of a training step,
   forward and backward. Each kernel makes one pass over memory. The included files are compiled as one unit.

   There are B sequences of T positions. A row is one position of one sequence. Inputs and outputs of matrix products
   have the `type` float32 or bfloat16. All other numbers are float32. A sum over rows is computed for each of PARTS
   parts (set by fused.py) or for each sequence, and the caller adds these partial sums. So the sum is bit-identical for
   any number of threads. */

#include "ops/common/norm_shift.c"
#include "ops/common/mixtures.c"
#include "ops/rwkv1/time_mix.c"
#include "ops/common/lags.c"
#include "ops/common/gates.c"
#include "ops/common/scale.c"
#include "ops/common/activate.c"

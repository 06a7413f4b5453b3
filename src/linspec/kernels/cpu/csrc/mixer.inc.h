/* All of a mixer's step, for the instruction set of the including file. */
#include "accumulate.inc.h"
#include "attention.inc.h"
#include "sinks.inc.h"
#include "quantized.inc.h"
#include "combine.inc.h"
#include "summed.inc.h"
#include "fading.inc.h"

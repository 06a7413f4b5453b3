/* All of a mixer's step, for the instruction set of the including file. */
#include "visible.inc.h"
#include "features.inc.h"
#include "accumulate.inc.h"
#include "rows.inc.h"
#include "scores.inc.h"
#include "attention.inc.h"
#include "combine.inc.h"

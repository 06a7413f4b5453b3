/* All of a mixer's step, for the instruction set of the including file. */
#include "take.inc.h"
#include "attention.inc.h"
#include "coded.inc.h"
#include "gather.inc.h"

//go:build linux && cgo && !noverbs

#include <malloc.h>
#include <stdlib.h>

__attribute__((constructor)) static void prepare(void)
{
	setenv("RDMAV_ALLOW_DISASSOC_DESTROY", "1", 0);
#ifdef M_ARENA_MAX
	mallopt(M_ARENA_MAX, 1);
#endif
}

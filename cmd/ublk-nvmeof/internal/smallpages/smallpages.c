//go:build linux && cgo

#include <sys/prctl.h>

#define EXCEPT_ADVISED 2 /* PR_THP_DISABLE_EXCEPT_ADVISED */

__attribute__((constructor)) static void use_small_pages(void)
{
	prctl(PR_SET_THP_DISABLE, 1, EXCEPT_ADVISED, 0, 0);
}

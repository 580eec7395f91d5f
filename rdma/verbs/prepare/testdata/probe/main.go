// Command probe prints what a program with packages disk and verbs finds in its process: the
// variable that package prepare sets, and whether malloc has an arena for each thread.
package main

/*
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static void *allocate(void *result)
{
	*(void **)result = malloc(1000);
	return NULL;
}

// The first arena is below the program break, and all others are above it.
static int another_arena(void)
{
	pthread_t thread;
	void *p = NULL;

	if (pthread_create(&thread, NULL, allocate, &p) || pthread_join(thread, NULL))
		return -1;
	return (char *)p > (char *)sbrk(0);
}

static const char *variable(void)
{
	const char *value = getenv("RDMAV_ALLOW_DISASSOC_DESTROY");

	return value ? value : "";
}
*/
import "C"

import (
	"fmt"

	_ "ublk-nvmeof/disk" // imports everything that an embedding program needs
	"ublk-nvmeof/rdma/verbs"
)

func main() {
	if _, err := verbs.New(); err != nil {
		_ = err // this machine has no RDMA device; New was called
	}
	fmt.Printf("%q %d\n", C.GoString(C.variable()), C.another_arena())
}

//go:build prepared

package main

import _ "ublk-nvmeof/rdma/verbs/prepare"

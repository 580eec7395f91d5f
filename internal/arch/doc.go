// Package arch tests the architecture. A table says which packages each package of
// this module may import; the test fails on any other import, and on a package that
// is not in the table or does not exist. Another test looks for the code that the
// documents name.
package arch

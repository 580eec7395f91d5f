// Package arch holds the arrows between the packages of this module: a table
// says what each package may import, and the test fails on anything else, and
// on a package that is not in the table.
package arch

//go:build tools

// Package tools names the program that this module pins; nothing here is compiled.
package tools

import _ "sigs.k8s.io/jobset"

//go:build tools

// Package tools names the program that this module pins; nothing here is compiled.
package tools

import _ "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager"

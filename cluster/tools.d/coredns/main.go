// CoreDNS with only the plugins that the local cluster uses: the stock binary
// carries some fifty, with the SDKs of three clouds behind them. There is no
// cache: every answer comes from memory, and a new pod's name must resolve at once.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

// Requests pass the plugins in this order, whatever the order in the Corefile.
func init() {
	dnsserver.Directives = []string{"bind", "health", "errors", "kubernetes"}
}

func main() { coremain.Run() }

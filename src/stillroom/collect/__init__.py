"""What talks to an endpoint: wire, transport, probe, rate control, spend account, request store. No torch."""

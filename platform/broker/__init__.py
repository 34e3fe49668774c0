"""The broker: admission, leases, the ledger, the queue, batches."""

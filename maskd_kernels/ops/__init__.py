"""One file per operator: schema, fake, autograd and the choice of backend."""

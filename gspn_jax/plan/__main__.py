from gspn_jax.plan import main

main()

from gspn_jax.prepare import main

main()
